"""The operators of the cache, `kvquant::decode_attention` and `kvquant::quantize_append`, and their backends.

`kvquant::latent_attention` is `decode_attention` over latents, whose keys have a second part (see `latent`).

This is the only file that names `torch.ops.kvquant`. The schemas take plain tensors, so that torch.compile and CUDA
graphs see every storage that is read or written. Python calls the operators through the functions at the bottom, which
call the backend without torch's dispatcher where nobody watches it: it takes as long as a short kernel. (Another
operator, `kvquant::retire`, makes room in the static storage of a sliding layer.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from itertools import zip_longest
from types import ModuleType
from typing import Any

import torch
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import reference
from .backends import AUTO, NAMES, gpu_refusal
from .quantization import DENSE, FORMATS, NO_FACTORS, Factors, QuantSpec
from .states import PagedStates, QuantizedStates, Stored

_States = QuantizedStates | PagedStates

# The longest update that is read as stored: decode, speculative verify, short chunks. The cache's definition has this
# limit.
MAX_Q_LEN = 32
# The dtypes of queries and exact copies that the compiled backends take; the reference takes every dtype.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of head_dim and group_size; the reference takes every one that can be quantized.
COMPILED_MULTIPLE = 16

try:
    _library = torch.library.Library("kvquant", "DEF")
except RuntimeError as error:
    raise ImportError(
        "hf_kvquant was imported before in this process and has left sys.modules since; torch cannot register its "
        "operators twice, so keep the module, or start a new process"
    ) from error


def _side(name: str, written: str = "") -> str:
    """The storage of keys or values as arguments of a schema; `written`: a letter per tensor, if it is written to."""
    optional = Stored._field_defaults
    return ", ".join(
        f"Tensor{f'({letter}!)' if letter else ''}{'?' if tensor in optional else ''} {name}_{tensor}"
        for tensor, letter in zip_longest(Stored._fields, written)
    )


# `length`: the number of stored columns as an int64 on the device. If it is given, `kv_len` is the width of the mask,
# and `start` is ignored. With `appends`, appending raises it.
_library.define(
    f"decode_attention(Tensor query, {_side('k')}, {_side('v')}, Tensor? sink_positions, Tensor? length, "
    "Tensor? mask, Tensor? s_aux, str k_spec, str v_spec, SymInt kv_len, int recent_length, float scaling, "
    "float softcap, str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"latent_attention(Tensor query, Tensor rotary_query, {_side('latent')}, {_side('rotary')}, "
    "Tensor? sink_positions, Tensor? length, Tensor? mask, Tensor? s_aux, str latent_spec, str rotary_spec, "
    "SymInt kv_len, int recent_length, float scaling, str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"quantize_append(Tensor key, Tensor value, {_side('k', 'abcde')}, {_side('v', 'fghij')}, "
    "Tensor(k!)? sink_positions, Tensor(l!) faults, Tensor? padding, Tensor(m!)? length, "
    "Tensor(n!)? appends, Tensor? k_factors, Tensor? v_factors, str k_spec, str v_spec, int start, str backend) -> ()"
)
# `length` and `dropped` are int64 on the device; see `reference.retire`.
_library.define(
    f"retire({_side('k', 'abcde')}, {_side('v', 'fghij')}, Tensor(k!) sink_positions, Tensor(l!) length, "
    "Tensor(m!) dropped, int block_length, int n, int kept) -> ()"
)


@lru_cache(maxsize=None)
def backend_status(name: str) -> str | None:
    """None if the backend `name` can run on this machine, else the reason why it cannot.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is unknown; expected one of {[AUTO, *NAMES]}")
    if name == "reference":
        return None
    try:
        return import_module(f".backends.{name}", __package__).unavailable()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"


@lru_cache(maxsize=None)
def choose_backend(requested: str, device_type: str, dtype: torch.dtype, small: int = 0) -> str:
    """The backend that runs for states of `dtype` on `device_type`: the requested one, or a choice if it is "auto".

    Args:
        small: a head_dim or group_size that no compiled backend takes, if the states have one.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the requested backend cannot run here, with the reason.
    """
    compiled = {"cpu": "cpu", "cuda": "cuda"}.get(device_type)
    if requested == AUTO:
        if compiled is None or dtype == torch.float64:
            return "reference"
        reason = backend_status(compiled)
        states, taken = _not_taken(dtype, small)
        if reason is None and states is None:
            return compiled
        why = f"takes {taken}" if reason is None else f"cannot run: {reason}"
        warnings.warn(
            f"{states or 'states'} on {device_type!r} run on the slow backend 'reference': the compiled one {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference"
    reason = backend_status(requested)
    if reason is None and requested != "reference":
        if requested != compiled:
            reason = f"the states are on device type {device_type!r}"
        else:
            states, taken = _not_taken(dtype, small)
            reason = None if states is None else f"{states} need backend 'reference'; {requested!r} takes {taken}"
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run: {reason}")
    return requested


def _not_taken(dtype: torch.dtype, small: int) -> tuple[str | None, str]:
    """What of the states compiled backends do not take, and what they take instead."""
    if dtype not in DTYPES:
        return f"{_names((dtype,))} states", _names(DTYPES)
    if small:
        return f"states with a head_dim or group_size of {small}", f"multiples of {COMPILED_MULTIPLE}"
    return None, ""


def check_formats(
    keys: QuantSpec,
    values: QuantSpec,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
) -> None:
    """Check that the backend of such states takes their specs with these head_dims, of keys and of values; a kernel
    would refuse them at the first tokens.

    Raises:
        ValueError: it does not; the message names the side.
        RuntimeError: the backend cannot run here.
    """
    reason = gpu_refusal(keys, values, head_dims)
    if reason is None or device.type == "meta":
        return
    small = _small((*head_dims, keys.group_size, values.group_size))
    if choose_backend(backend, device.type, dtype, small) == "cuda":
        raise ValueError(reason)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _decode_attention(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    k_stored, v_stored, others = _sides(args)
    sink_positions, length, mask, s_aux, k_spec, v_spec, kv_len, recent_length, scaling, softcap, backend = others
    keys, values = (
        QuantizedStates.of(
            spec=QuantSpec.from_code(spec), stored=stored, sink_positions=sink_positions, length=kv_len,
            recent_length=recent_length, head_dim=head_dim, dtype=query.dtype, device_length=length,
        )
        for spec, stored, head_dim in (
            (k_spec, k_stored, query.shape[-1]),
            (v_spec, v_stored, _head_dim(v_spec, v_stored.data)),
        )
    )  # fmt: skip
    chosen = _backend(query, keys, values, backend)
    return chosen.decode_attention(query, keys, values, mask, s_aux, scaling=scaling, softcap=softcap)


def _latent_attention(
    query: torch.Tensor, rotary_query: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    l_stored, r_stored, others = _sides(args)
    sink_positions, length, mask, s_aux, l_spec, r_spec, kv_len, recent_length, scaling, backend = others
    latents, rotary = (
        QuantizedStates.of(
            spec=QuantSpec.from_code(spec), stored=stored, sink_positions=sink_positions, length=kv_len,
            recent_length=recent_length, head_dim=x.shape[-1], dtype=x.dtype, device_length=length, backend=backend,
        )
        for spec, stored, x in ((l_spec, l_stored, query), (r_spec, r_stored, rotary_query))
    )  # fmt: skip
    return _attend_latents(query, rotary_query, latents, rotary, mask, s_aux, scaling)


def _attend_latents(
    query: torch.Tensor,
    rotary_query: torch.Tensor,
    latents: QuantizedStates,
    rotary: QuantizedStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = _backend(query, latents, latents, latents.backend)
    if backend.reads_rotary_keys(latents, rotary):
        both = rotary_query, rotary
        return backend.decode_attention(query, latents, latents, mask, s_aux, scaling=scaling, rotary=both)
    # Asking a GPU for the length would wait for it.
    if latents.device.type == "cpu":
        latents, rotary = latents.known(), rotary.known()
    mask = reference.rotary_mask(rotary_query, rotary, mask, scaling)
    return backend.decode_attention(query, latents, latents, mask, s_aux, scaling=scaling)


def _quantize_append(key: torch.Tensor, value: torch.Tensor, *args: Any) -> None:
    k_stored, v_stored, others = _sides(args)
    sink_positions, faults, padding, length, appends, *factors, k_spec, v_spec, start, backend = others
    keys, values = (
        QuantizedStates.of(
            spec=QuantSpec.from_code(spec), stored=stored, sink_positions=sink_positions, length=start,
            recent_length=0, head_dim=x.shape[-1], dtype=x.dtype, device_length=length,
        )
        for spec, stored, x in ((k_spec, k_stored, key), (v_spec, v_stored, value))
    )  # fmt: skip
    chosen = _backend(key, keys, values, backend)
    chosen.quantize_append(
        key, value, keys, values, faults, padding, start=start, appends=appends, factors=Factors(*factors)
    )


def _retire(*args: Any) -> None:
    k_stored, v_stored, others = _sides(args)
    reference.retire(k_stored, v_stored, *others)


def _sides(args: tuple) -> tuple[Stored, Stored, tuple]:
    """The arguments of an operator as the storage of keys, the storage of values, and the rest."""
    return Stored._make(args[:5]), Stored._make(args[5:10]), args[10:]


def _backend(x: torch.Tensor, keys: _States, values: _States, name: str) -> ModuleType:
    """The backend that runs an operator for queries or new tokens `x`."""
    sizes = keys.head_dim, values.head_dim, keys.spec.group_size, values.spec.group_size
    return _implementation(name, x.device, x.dtype, sizes)


@lru_cache(maxsize=None)
def _implementation(
    backend: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int | None, ...]
) -> ModuleType:
    name = choose_backend(backend, device.type, dtype, _small(sizes))
    return reference if name == "reference" else import_module(f".backends.{name}", __package__)


def _small(sizes: Iterable[int | None]) -> int:
    """The first head_dim or group_size that only the reference takes, or 0."""
    return next((size for size in sizes if size and size % COMPILED_MULTIPLE), 0)


def _is_watched(x: torch.Tensor) -> bool:
    """Whether a compiler, a tensor subclass, a dispatch mode or the profiler shall see the operators called with x."""
    return (
        type(x) is not torch.Tensor
        or is_dynamo_compiling()
        or is_in_torch_dispatch_mode()
        or profiler._is_profiler_enabled
    )


def _head_dim(spec: str, data: torch.Tensor) -> int:
    row = data.shape[-1]
    return row if spec == DENSE else row * 8 // FORMATS[spec.partition(":")[0]].bits


_library.impl("decode_attention", _decode_attention, "CompositeExplicitAutograd")
_library.impl("latent_attention", _latent_attention, "CompositeExplicitAutograd")
_library.impl("quantize_append", _quantize_append, "CompositeExplicitAutograd")
_library.impl("retire", _retire, "CompositeExplicitAutograd")


@torch.library.register_fake("kvquant::decode_attention", lib=_library)
def _(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, v_stored, (*_, v_spec, _, _, _, _, _) = _sides(args)
    shape = (*query.shape[:-1], _head_dim(v_spec, v_stored.data))
    return query.new_empty(shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("kvquant::latent_attention", lib=_library)
def _(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("kvquant::quantize_append", lib=_library)
@torch.library.register_fake("kvquant::retire", lib=_library)
def _(*args: Any) -> None:
    return None


def decode_attention(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.decode_attention`, on the backend that the states name; q_len is 1 to 32.

    Raises:
        ValueError: a shape, dtype or length does not fit the others; it is named.
    """
    watched = _is_watched(query)
    if not watched and mask is None and s_aux is None and keys.stored.attend_again is not None:
        results = keys.stored.attend_again(query, keys, values, scaling, softcap)
        if results is not None:
            return results
    _check(query, keys, values, mask, s_aux)
    if not watched:
        backend = _backend(query, keys, values, keys.backend)
        return backend.decode_attention(query, keys, values, mask, s_aux, scaling=scaling, softcap=softcap)
    return torch.ops.kvquant.decode_attention.default(
        query, *keys.stored, *values.stored, keys.sink_positions, keys.device_length, mask, s_aux,
        keys.spec.code, values.spec.code, keys.length, keys.recent_length, scaling, softcap, keys.backend,
    )  # fmt: skip


def latent_attention(
    query: torch.Tensor,
    rotary_query: torch.Tensor,
    latents: QuantizedStates,
    rotary: QuantizedStates,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over latents, which are keys and values of all heads; keys have a second part, rotary keys.

        scores = scaling * (query . latents + rotary_query . rotary)

    Kernels that do not read rotary keys get their scores as a mask (`reference.rotary_mask`).

    Args:
        query: `[batch, num_heads, q_len, rank]` in the space of latents.
        rotary_query: `[batch, num_heads, q_len, rotary head_dim]`.
        latents, rotary: states of one head and of the same columns.
        mask, s_aux: as in `reference.decode_attention`.

    Returns:
        Output `[batch, num_heads, q_len, rank]` and the log-sum-exp of the scores, float32.

    Raises:
        ValueError: a shape, dtype or length does not fit the others; it is named.
    """
    _check(query, latents, latents, mask, s_aux)
    _check_rotary(query, rotary_query, latents, rotary)
    if not _is_watched(query):
        return _attend_latents(query, rotary_query, latents, rotary, mask, s_aux, scaling)
    return torch.ops.kvquant.latent_attention.default(
        query, rotary_query, *latents.stored, *rotary.stored, latents.sink_positions, latents.device_length, mask,
        s_aux, latents.spec.code, rotary.spec.code, latents.length, latents.recent_length, scaling, latents.backend,
    )  # fmt: skip


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
) -> None:
    """Same as `reference.quantize_append`, on the backend that the states name."""
    if not _is_watched(key):
        again = keys.stored.append_again
        if again is not None and again(key, value, keys, values, faults, padding, start, appends, factors):
            return
        backend = _backend(key, keys, values, keys.backend)
        backend.quantize_append(
            key, value, keys, values, faults, padding, start=start, appends=appends, factors=factors
        )
        return
    torch.ops.kvquant.quantize_append.default(
        key, value, *keys.stored, *values.stored, keys.sink_positions, faults, padding, keys.device_length,
        appends, *factors, keys.spec.code, values.spec.code, start, keys.backend,
    )  # fmt: skip


def paged_attention(
    query: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.paged_attention`, on the backend that the states name. Not compiled: continuous batching runs
    it outside of graphs.

    Raises:
        ValueError: a shape, dtype or length does not fit the others; it is named.
    """
    backend = _backend(query, keys, values, keys.backend)
    return backend.paged_attention(query, keys, values, s_aux, scaling=scaling, softcap=softcap)


def paged_past(states: PagedStates, row: int, more: int = 0) -> torch.Tensor:
    """Same as `PagedStates.past`, by the CPU backend if the states name it."""
    if states.data.device.type != "cpu" or states.spec.is_dense:
        return states.past(row, more)
    sizes = states.head_dim, states.spec.group_size
    backend = _implementation(states.backend, states.data.device, states.dtype, sizes)
    return states.past(row, more, backend.paged_read)


def takes_prompts(query: torch.Tensor, backend: str) -> bool:
    """Whether `prompt_attention` runs for these queries: BF16, on a CPU with AVX-512 BF16."""
    head_dim = query.shape[3]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or head_dim % COMPILED_MULTIPLE:
        return False
    return _implementation(backend, query.device, query.dtype, (head_dim,)).takes_prompts()


def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None, *, scaling: float
) -> torch.Tensor:
    """Exact causal attention of the last tokens of one sequence, where `takes_prompts` is true.

    torch's own kernel multiplies BF16 about as fast as FP32 on some processors. This one skips what causal order or
    the window hides, and reads keys and values as they are, without a copy for each query head.

    Args:
        query: `[1, num_heads, n, head_dim]`, BF16.
        key, value: `[1, num_kv_heads, kv_len, head_dim]`; query i is at position `kv_len - n + i`.
        window: how many columns a query sees, its own among them; None: all up to its own.

    Returns:
        `[1, n, num_heads, head_dim]`, as attention functions of transformers do.
    """
    cpu: Any = _implementation("cpu", query.device, query.dtype, ())
    return cpu.prompt_attention(query, key, value, window, scaling=scaling)


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    factors: Factors = NO_FACTORS,
) -> None:
    """Same as `reference.paged_append`, on the backend that the states name."""
    backend = _backend(key, keys, values, keys.backend)
    backend.paged_append(key, value, keys, values, faults, factors)


def retire(
    keys: Stored,
    values: Stored,
    sink_positions: torch.Tensor,
    length: torch.Tensor,
    dropped: torch.Tensor,
    *,
    block_length: int,
    n: int,
    kept: int,
) -> None:
    """Same as `reference.retire`, the only implementation: it copies, and computes nothing."""
    torch.ops.kvquant.retire.default(*keys, *values, sink_positions, length, dropped, block_length, n, kept)


def _check(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
) -> None:
    batch, num_heads, q_len, head_dim = query.shape
    rows, num_kv_heads, _, _ = keys.stored.data.shape
    v_rows, v_heads, _, _ = values.stored.data.shape
    fits = (
        head_dim == keys.head_dim and query.dtype == keys.dtype and batch == rows == v_rows
        and num_heads % num_kv_heads == 0 and num_kv_heads == v_heads
        and 1 <= q_len <= MAX_Q_LEN and q_len <= keys.length == values.length
    )  # fmt: skip
    if not fits:
        raise ValueError(_misfit(query, keys, values))
    if s_aux is not None and tuple(s_aux.shape) != (num_heads,):
        raise ValueError(f"s_aux: shape {tuple(s_aux.shape)} is not allowed; expected ({num_heads},)")
    if mask is None:
        return
    full = (batch, keys.length) if mask.ndim == 2 else (batch, num_heads, q_len, keys.length)
    broadcast = mask.ndim == len(full) and mask.shape[-1] == keys.length
    if not broadcast or any(m != 1 and m != f for m, f in zip(mask.shape, full)):
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not fit; expected {full}, or 1 instead of a size")
    # An integer mask of 0 and 1 would be added to the scores.
    if mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: dtype {mask.dtype} is not allowed in a 4-D mask; expected bool or a floating dtype")


def _check_rotary(
    query: torch.Tensor, rotary_query: torch.Tensor, latents: QuantizedStates, rotary: QuantizedStates
) -> None:
    expected = (*query.shape[:3], rotary.head_dim)
    if rotary_query.shape != expected or rotary_query.dtype != query.dtype:
        raise ValueError(
            f"rotary_query: {tuple(rotary_query.shape)} of {rotary_query.dtype} does not fit the cached rotary keys; "
            f"expected {expected} of {query.dtype}"
        )
    if rotary.length != latents.length or rotary.data.shape[:2] != latents.data.shape[:2]:
        raise ValueError(
            f"rotary: {tuple(rotary.shape)} does not fit the cached latents; expected {tuple(latents.shape[:3])} rows"
        )


def _misfit(query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> str:
    """The message about the first thing that does not fit. `_check` makes the same checks faster, without messages."""
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, most = keys.shape[1], min(MAX_Q_LEN, keys.length)
    for name, value, expected, fits in (
        ("query head_dim", head_dim, keys.head_dim, head_dim == keys.head_dim),
        ("query dtype", query.dtype, keys.dtype, query.dtype == keys.dtype),
        ("query batch", batch, keys.shape[0], batch == keys.shape[0]),
        ("num_heads", num_heads, f"a multiple of num_kv_heads {num_kv_heads}", num_heads % num_kv_heads == 0),
        ("q_len", q_len, f"1 to {most}", 1 <= q_len <= most),
        ("values batch, heads", [*values.shape[:2]], [*keys.shape[:2]], values.shape[:2] == keys.shape[:2]),
        ("values length", values.length, keys.length, values.length == keys.length),
    ):
        if not fits:
            return f"{name}: {value} does not fit the cached keys; expected {expected}"
    raise AssertionError("everything fits")
