"""The CUDA backend: which kernels of `kernels/cuda` an operator launches, on which grid, with which workspace.

The workspace comes from torch's allocator and nothing waits for the device, so that calls can be captured in CUDA
graphs. `device` is where the kernels run, by default the query's GPU; the tests pass an emulator, so that arguments,
grids and specialisations are checked as they run.
"""

from __future__ import annotations

import torch

from . import arguments, disk_cache, gpu, nvrtc
from .specialisation import SPLIT, THREADS, specialisation

# Rows (queries of the heads that share a KV head) in one tile of the tensor cores.
TILE_ROWS = 16


def unavailable() -> str | None:
    """None if this backend can run, else the reason why it cannot."""
    if not torch.cuda.is_available():
        return "torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if best < gpu.MIN_CAPABILITY:
        return gpu.too_old(best)
    reason = nvrtc.missing()
    if reason is None:
        try:
            nvrtc.architecture(*best)
            nvrtc.source_folder()
        except (OSError, RuntimeError) as error:
            return str(error)
    return reason


def info() -> dict:
    """What `hf-kvquant info` says about this backend, which need not be able to run."""
    kept = disk_cache.folder()
    return {
        "compiler": nvrtc.missing() or "NVRTC {}.{}".format(*nvrtc.version()),
        "compiled kernels": f"{len(list(kept.glob('*.cubin')))} in {kept}",
    }


def decode_attention(query, keys, values, mask=None, s_aux=None, *, scaling, softcap=0.0, device=None):
    """`reference.decode_attention` (which see).

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, by name.
        nvrtc.CompileError: a kernel does not compile.
    """
    call, output, logsumexp = arguments.attention(query, keys, values, mask, s_aux, scaling, softcap)
    kind = specialisation(call.dtype, keys.spec, values.spec, keys.head_dim, values.head_dim)
    batch, num_heads, q_len, v_head_dim = output.shape
    num_kv_heads, splits = call.num_kv_heads, -(-call.kv_len // SPLIT)
    row_tiles = -(-(num_heads // num_kv_heads * q_len) // TILE_ROWS)
    # Of every split: the sum of values, the largest score and the sum of weights.
    partial = query.new_empty((batch, num_heads, q_len, splits, v_head_dim + 2), dtype=torch.float32)
    touched = {}
    if device is None:
        device = gpu.of(query, mask, s_aux)
    else:
        reads = [query, mask, s_aux, *_tensors(keys), *_tensors(values), *call.alive]
        touched = {"reads": _present(reads), "writes": (output, logsumexp, partial)}
    grid = (splits, num_kv_heads * row_tiles, batch)
    device.launch("decode_attention_kernel", kind, grid, THREADS, 0, call, partial, **touched)
    device.launch("merge_splits_kernel", kind, (q_len, num_heads, batch), THREADS, 0, call, partial, **touched)
    return output, logsumexp


def _tensors(states) -> tuple[torch.Tensor | None, ...]:
    storage = (states.data, states.scale, states.zero_point, states.recent, states.sink)
    return (*storage, states.sink_positions, states.device_length)


def _present(tensors) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
