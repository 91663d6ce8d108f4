"""The CUDA backend: launches the kernels of `kernels/cuda` with their grids and workspace.

The workspace comes from torch's allocator and nothing waits for the device, so that calls can be captured in CUDA
graphs. `device` runs the kernels, by default the query's GPU; tests pass an emulator, which checks arguments, grids
and specialisations as the kernels run.
"""

from __future__ import annotations

from typing import Any

import torch

from ..quantization import NO_FACTORS, Factors
from ..states import PagedStates, QuantizedStates
from . import arguments, disk_cache, gpu, nvrtc
from .specialisation import THREADS, RotaryKeys, append_kind, most_splits, plan

_States = QuantizedStates | PagedStates

MAX_GRID = 65535


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
    """The facts that `hf-kvquant info` prints about this backend, even if it cannot run."""
    kept = disk_cache.folder()
    return {
        "compiler": nvrtc.missing() or f"NVRTC {nvrtc.version_name()}",
        "compiled kernels": f"{len(list(kept.glob('*.cubin')))} in {kept}",
    }


def decode_attention(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    rotary: tuple[torch.Tensor, QuantizedStates] | None = None,
    device: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.decode_attention`, or as `ops.latent_attention`.

    Args:
        rotary: queries for the rotary keys beside latents, and those keys, of which `reads_rotary_keys` is true.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take; it is named.
        nvrtc.CompileError: a kernel does not compile.
    """
    call, output, logsumexp = arguments.attention(query, keys, values, mask, s_aux, scaling, softcap, rotary=rotary)
    _attend(call, output, logsumexp, keys, values, device, None if rotary is None else rotary[1])
    return output, logsumexp


def reads_rotary_keys(latents: QuantizedStates, rotary: QuantizedStates) -> bool:
    """Whether `decode_attention` reads these rotary keys beside the latents."""
    copies = [(states.recent is None, states.sink is None) for states in (latents, rotary)]
    beside = arguments.DTYPES.get(latents.dtype, -1), latents.spec
    return copies[0] == copies[1] and RotaryKeys(rotary.spec, rotary.head_dim).go_with(*beside)


def takes_prompts() -> bool:
    """No: there is no `prompt_attention` here."""
    return False


def paged_attention(
    query: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    device: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.paged_attention`; no page is copied, and nothing waits for the device.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a table that is not on the GPU.
        nvrtc.CompileError: a kernel does not compile.
    """
    call, output, logsumexp = arguments.paged_attention(query, keys, values, s_aux, scaling, softcap)
    _attend(call, output, logsumexp, keys, values, device)
    return output, logsumexp


def _attend(
    call: arguments.Attention,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    keys: _States,
    values: _States,
    device: Any,
    rotary: QuantizedStates | None = None,
) -> None:
    """Launch the kernels of an attention call; `rotary`: the rotary keys beside keys that are latents."""
    batch, num_heads, q_len, v_head_dim = output.shape
    num_kv_heads, page_length = call.num_kv_heads, keys.page_length if isinstance(keys, PagedStates) else 0
    rows = num_heads // num_kv_heads * q_len
    second = None if rotary is None else rotary.stored.layout.form
    planned = plan(call.dtype, keys.stored.layout.form, values.stored.layout.form, rows, page_length, second)
    if not keys.stored.is_aligned:
        _check_alignment("keys", call, _KEYS, keys)
    if not values.stored.is_aligned:
        _check_alignment("values", call, _VALUES, values)
    if rotary is not None and not rotary.stored.is_aligned:
        _check_alignment("rotary keys", call, _ROTARY, rotary)
    slices = planned.copy_slices + most_splits(call.kv_len, num_kv_heads)
    # Every slice has the sum of values, the largest score and the sum of weights.
    partial = output.new_empty(batch * num_heads * q_len * slices * (v_head_dim + 2), dtype=torch.float32)
    touched = {}
    if device is None:
        device = gpu.of(output)
    else:
        reads = (*call.alive, *_tensors(keys), *_tensors(values), *(() if rotary is None else _tensors(rotary)))
        touched = {"reads": reads, "writes": (output, logsumexp, partial)}
    grids = {
        "decode_attention_kernel": (slices, num_kv_heads * -(-rows // planned.rows), batch * planned.shares),
        "merge_splits_kernel": (q_len, num_heads, batch),
    }
    device.launch(grids, planned.kind, call, partial, **touched)


def quantize_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    faults: torch.Tensor,
    padding: torch.Tensor | None = None,
    *,
    start: int,
    appends: torch.Tensor | None = None,
    factors: Factors = NO_FACTORS,
    device: Any = None,
) -> None:
    """Same as `reference.quantize_append`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take; it is named.
        nvrtc.CompileError: a kernel does not compile.
    """
    key, value = _aligned(key), _aligned(value)
    call = arguments.append(key, value, keys, values, faults, padding, start, appends=appends, factors=factors)
    _append(call, keys, values, faults, device, appends)


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    factors: Factors = NO_FACTORS,
    *,
    device: Any = None,
) -> None:
    """Same as `reference.paged_append`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a table that is not on the GPU.
        nvrtc.CompileError: a kernel does not compile.
    """
    key, value = _aligned(key), _aligned(value)
    call = arguments.paged_append(key, value, keys, values, faults, factors=factors)
    _append(call, keys, values, faults, device)


def _append(
    call: arguments.Append,
    keys: _States,
    values: _States,
    faults: torch.Tensor,
    device: Any,
    appends: torch.Tensor | None = None,
) -> None:
    """Launch the kernel of an append."""
    page_length = keys.page_length if isinstance(keys, PagedStates) else 0
    feedback = _has_factors("key", call.keys), _has_factors("value", call.values)
    kind = append_kind(call.dtype, keys.stored.layout.form, values.stored.layout.form, page_length, feedback)
    if not keys.stored.is_aligned:
        _check_alignment("keys", call, _NEW_KEYS, keys)
    if not values.stored.is_aligned:
        _check_alignment("values", call, _NEW_VALUES, values)
    n = call.keys.n
    blocks = max(_append_blocks(n, keys), _append_blocks(n, values))
    touched = {}
    if device is None:
        device = gpu.of(faults)
    else:
        touched = {"reads": call.alive, "writes": (faults, *_tensors(keys), *_tensors(values))}
    grid = (blocks, 2 * call.num_kv_heads, call.batch)
    device.launch({"quantize_append_kernel": grid}, kind, call, appends, **touched)


def _has_factors(name: str, new: arguments.NewTokens) -> bool:
    """Whether new tokens have error feedback, whose rows are copied in chunks of 16 bytes."""
    address = new.factors
    if address is not None and address % 16:
        raise ValueError(f"{name} factors: address {address} is not allowed; expected a multiple of 16 bytes")
    return address is not None


def _append_blocks(n: int, states: _States) -> int:
    """The number of thread blocks among which the new tokens of a head are divided."""
    if n == 1:
        return 1
    if states.spec.grid == "channel":
        return min(-(-(n - 1) // states.spec.block_length) + 1, MAX_GRID)
    # A row is spread over lanes of 8 channels each, at most 32; a thread has four octets of channels in flight.
    lanes = 8 if states.head_dim <= 64 else 16 if states.head_dim <= 128 else 32 if states.head_dim <= 256 else 64
    return min(-(-n // (4 * THREADS // lanes)), MAX_GRID)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The new tokens, copied if they are not aligned for loads of eight channels at once."""
    batch, head, row, column = x.stride()
    if column == 1 and not (x.data_ptr() | (batch | head | row) * x.element_size()) % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# The offsets of the sides in the structs, in words of 8 bytes.
_KEYS, _VALUES = (getattr(arguments.Attention, side).offset // 8 for side in ("keys", "values"))
_ROTARY = (arguments.Attention.rotary.offset + arguments.Rotary.side.offset) // 8
_NEW_KEYS, _NEW_VALUES = (
    (getattr(arguments.Append, side).offset + arguments.NewTokens.side.offset) // 8 for side in ("keys", "values")
)
# A side's words: five addresses, then their strides of batch and head (zero_point shares those of scale).
_STORED = {"data": (0, 5, 6), "recent": (3, 9, 10), "sink": (4, 11, 12)}
_SCALES = {"scale": (1, 7, 8), "zero_point": (2, 7, 8)}


def _check_alignment(name: str, call: arguments.Attention | arguments.Append, side: int, states: _States) -> None:
    """Check, once for each `Stored`, that rows can be read in chunks of 16 bytes, or of 8 if a stored row is not a
    multiple of 16 bytes."""
    words = memoryview(call).cast("B").cast("Q")
    for tensor, (address, *strides) in (_STORED | _SCALES if states.spec.grid == "channel" else _STORED).items():
        chunk = 8 if tensor == "data" and states.data.shape[-1] * states.data.element_size() % 16 else 16
        for what, place in (("address", address), *(("stride", stride) for stride in strides)):
            number = words[side + place]
            if number % (16 if what == "address" else chunk):
                expected = f"expected a multiple of {chunk if what == 'stride' else 16} bytes"
                raise ValueError(f"{name} {tensor}: {what} {number} is not allowed; {expected}")
    states.stored.is_aligned = True


def _tensors(states: _States) -> tuple[torch.Tensor | None, ...]:
    if isinstance(states, PagedStates):
        return states.stored
    return (*states.stored, states.sink_positions, states.device_length)
