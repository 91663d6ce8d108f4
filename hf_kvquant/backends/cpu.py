"""The CPU backend: calls the library with ctypes; the structs are `arguments`.

The library has a plain C ABI, so that one build serves every Python and every torch; a call releases the GIL. It uses
the best instruction set that the processor has, or the one that the environment variable KVQUANT_CPU_ISA names.
"""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from ..states import PagedStates, QuantizedStates
from . import arguments

ISA_VARIABLE = "KVQUANT_CPU_ISA"
_STATUS = {1: "this processor lacks the requested instruction set", 2: "out of memory"}


@lru_cache(maxsize=None)
def _path() -> str:
    found = [str(f) for f in files(__package__.rpartition(".")[0]).iterdir() if f.name.startswith("_kvquant_cpu.")]
    if not found:
        raise OSError("the CPU library _kvquant_cpu is not in the package; it was not built with pip install")
    return found[0]


@lru_cache(maxsize=None)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_path())
    library.kvquant_level_name.restype = ctypes.c_char_p
    structs = {
        "attention": arguments.Attention,
        "append": arguments.Append,
        "prompt": arguments.Prompt,
        "read": arguments.Read,
    }
    for function, struct in structs.items():
        size = getattr(library, f"kvquant_{function}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(struct):
            raise OSError(f"{_path()} does not belong to this version of the package (size of {function} arguments)")
    pointer = ctypes.c_void_p
    library.kvquant_decode_attention_again.argtypes = ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int64
    library.kvquant_quantize_append_again.argtypes = ctypes.c_char_p, pointer, pointer, ctypes.c_int64
    library.kvquant_use_openmp(ctypes.c_void_p(_openmp_parallel()))
    return library


@lru_cache(maxsize=None)
def _openmp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch uses, or None if it has no such runtime.

    Torch's threads spin for a while after each of its operators, so the library shares them; a second set of threads
    would oversubscribe the processor. Both GNU's and LLVM's runtime have this function, and the process finds that of
    the runtime that torch loaded.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@lru_cache(maxsize=None)
def _instruction_sets() -> tuple[dict[str, int], tuple[str, ...]]:
    """The indices of all instruction sets by name, ascending, and the names of those that this processor has."""
    library = _library()
    indices: dict[str, int] = {}
    while (name := library.kvquant_level_name(ctypes.c_int64(len(indices)))) is not None:
        indices[name.decode()] = len(indices)
    return indices, tuple(name for name, i in indices.items() if library.kvquant_level_runs(ctypes.c_int64(i)))


@lru_cache(maxsize=None)
def _index(name: str | None) -> int:
    indices, runs = _instruction_sets()
    name = name or runs[-1]
    if name not in runs:
        what = "does not run on this processor" if name in indices else "is unknown"
        raise ValueError(f"{ISA_VARIABLE}: instruction set {name!r} {what}; expected one of {list(runs)}")
    return indices[name]


_from_environment = os.environ.get(ISA_VARIABLE) or None


def isa() -> str:
    """The instruction set that calls use.

    Raises:
        ValueError: KVQUANT_CPU_ISA names one that is unknown or does not run here.
    """
    return list(_instruction_sets()[0])[_index(_from_environment)]


def unavailable() -> str | None:
    """None if this backend can run, else the reason why it cannot."""
    try:
        isa()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def info() -> dict:
    """The facts that `hf-kvquant info` prints about this backend."""
    return {
        "isa": isa(),
        "available": list(_instruction_sets()[1]),
        "threads": torch.get_num_threads(),
        "thread pool": "own" if _openmp_parallel() is None else "torch's OpenMP",
        "library": _path(),
    }


def _call(function: Callable[[Any], int], struct: ctypes.Structure) -> None:
    _raise_if_failed(function(ctypes.byref(struct)))


def _raise_if_failed(status: int) -> None:
    if status:
        raise MemoryError(_STATUS[status]) if status == 2 else RuntimeError(_STATUS[status])


def _check_length(length: torch.Tensor, least: int) -> None:
    """Check a length that is read from memory against its lower bound; the kernels check only the upper one."""
    if int(length) < least:
        raise ValueError(f"length: {int(length)} is not allowed; expected {least} or more")


def decode_attention(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.decode_attention`. `isa` names an instruction set; the default is `isa()`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    is_used_again = keys.stored.layout is not None
    call, output, logsumexp = arguments.attention(
        query, keys, values, mask, s_aux, scaling, softcap, _index(isa or _from_environment), torch.get_num_threads()
    )
    if keys.device_length is not None:
        _check_length(keys.device_length, query.shape[2])
    _call(_library().kvquant_decode_attention, call)
    # A copy of the queries has other strides. Latents are keys and values at once, and would refer to themselves.
    is_plain = mask is None and s_aux is None and isa is None and query.stride(3) == 1
    if is_used_again and is_plain and keys.stored is not values.stored:
        keys.stored.attend_again = _AttendAgain(call, query, keys, values, scaling, softcap)
    return output, logsumexp


class _Again:
    """A call as steps repeat it, with other queries or new tokens of the same layout, at another column.

    A step compares what the call depends on with the step before it. That takes half as long as to check it, to
    choose a backend, and to fill a struct, of which most time is lost where the processor's caches are cold.
    """

    def __init__(self, call: ctypes.Structure, keys: QuantizedStates, values: QuantizedStates, *others: Any):
        self._call = bytes(call)
        self._objects = values.stored, keys.sink_positions, keys.device_length, *others
        tensors = list(keys.stored)
        for other in self._objects:
            tensors += other if isinstance(other, tuple) else [other]
        self._tensors = [tensor for tensor in tensors if tensor is not None]
        self._addresses = self._read_addresses()
        self._columns = min(side.stored.layout.columns for side in (keys, values))

    def _read_addresses(self) -> list[int]:
        """Of all tensors but those that differ from step to step; `share_memory_` moves memory, and leaves the tensors
        as they are."""
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _has_same(self, keys: QuantizedStates, values: QuantizedStates, *others: Any) -> bool:
        """Whether the call reads and writes the same objects, and these are where they were."""
        objects = values.stored, keys.sink_positions, keys.device_length, *others
        return all(map(operator.is_, objects, self._objects)) and self._read_addresses() == self._addresses


class _AttendAgain(_Again):
    """See `Stored.attend_again`."""

    def __init__(
        self,
        call: arguments.Attention,
        query: torch.Tensor,
        keys: QuantizedStates,
        values: QuantizedStates,
        scaling: float,
        softcap: float,
    ):
        super().__init__(call, keys, values)
        self._function = _library().kvquant_decode_attention_again
        self._size = *query.shape[:3], values.head_dim
        self._same = self._compared(query, keys, values, scaling, softcap)

    @staticmethod
    def _compared(
        query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates, scaling: float, softcap: float
    ) -> tuple:
        return (
            query.shape, query.stride(), query.dtype, keys.dtype, keys.head_dim, values.head_dim, keys.spec,
            values.spec, keys.recent_length, keys.backend, scaling, softcap, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(
        self, query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates, scaling: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        batch, num_heads, q_len, head_dim = self._size
        kv_len, length = keys.length, keys.device_length
        if (
            values.length != kv_len
            or not q_len <= kv_len <= self._columns
            or not query.is_cpu
            or self._compared(query, keys, values, scaling, softcap) != self._same
            or not self._has_same(keys, values)
        ):
            return None
        if length is not None:
            _check_length(length, q_len)
        output = query.new_empty(batch, num_heads, q_len, head_dim)
        logsumexp = query.new_empty(batch, num_heads, q_len, dtype=torch.float32)
        addresses = query.data_ptr(), output.data_ptr(), logsumexp.data_ptr()
        _raise_if_failed(self._function(self._call, *addresses, kv_len))
        return output, logsumexp


class _AppendAgain(_Again):
    """See `Stored.append_again`."""

    def __init__(
        self, call: arguments.Append, key: torch.Tensor, value: torch.Tensor, keys: QuantizedStates,
        values: QuantizedStates, *others: Any,
    ):  # fmt: skip
        super().__init__(call, keys, values, *others)
        self._function = _library().kvquant_quantize_append_again
        self._same = self._compared(key, value, keys, values)

    @staticmethod
    def _compared(key: torch.Tensor, value: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> tuple:
        return (
            key.shape, key.stride(), key.dtype, value.shape, value.stride(), value.dtype, keys.head_dim,
            values.head_dim, keys.spec, values.spec, keys.backend, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: QuantizedStates,
        values: QuantizedStates,
        faults: torch.Tensor,
        padding: torch.Tensor | None,
        start: int,
        appends: torch.Tensor | None,
        factors: arguments.Factors,
    ) -> bool:
        n, length = key.size(2), keys.device_length
        if (
            not (length is not None or 0 <= start <= self._columns - n)
            or not (key.is_cpu and value.is_cpu)
            or self._compared(key, value, keys, values) != self._same
            or not self._has_same(keys, values, faults, padding, appends, factors)
        ):
            return False
        if length is not None:
            _check_length(length, 0)
        _raise_if_failed(self._function(self._call, key.data_ptr(), value.data_ptr(), start))
        if appends is not None:
            keys.count_append(n, appends)
        return True


def reads_rotary_keys(latents: QuantizedStates, rotary: QuantizedStates) -> bool:
    """No: their scores are a mask of `decode_attention`; see `ops.latent_attention`."""
    return False


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
    factors: arguments.Factors = arguments.NO_FACTORS,
    isa: str | None = None,
) -> None:
    """Same as `reference.quantize_append`. `isa` names an instruction set; the default is `isa()`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    is_used_again = keys.stored.layout is not None
    index, threads = _index(isa or _from_environment), torch.get_num_threads()
    call = arguments.append(key, value, keys, values, faults, padding, start, index, threads, appends, factors)
    if keys.device_length is not None:
        _check_length(keys.device_length, 0)
    _call(_library().kvquant_quantize_append, call)
    if appends is not None:
        keys.count_append(key.shape[2], appends)
    # Copies have other addresses. Without exact copies a block can only be begun at its start, which is checked.
    is_plain = isa is None and key.stride(3) == value.stride(3) == 1 and (padding is None or padding.stride(1) == 1)
    begins_blocks = any(side.stored.recent is None and side.spec.is_channel for side in (keys, values))
    if is_used_again and is_plain and not begins_blocks and keys.stored is not values.stored:
        others = faults, padding, appends, factors
        keys.stored.append_again = _AppendAgain(call, key, value, keys, values, *others)


def paged_attention(
    query: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `reference.paged_attention`; no page is copied."""
    index, threads = _index(isa or _from_environment), torch.get_num_threads()
    call, output, logsumexp = arguments.paged_attention(query, keys, values, s_aux, scaling, softcap, index, threads)
    _call(_library().kvquant_decode_attention, call)
    return output, logsumexp


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    factors: arguments.Factors = arguments.NO_FACTORS,
    *,
    isa: str | None = None,
) -> None:
    """Same as `reference.paged_append`."""
    index, threads = _index(isa or _from_environment), torch.get_num_threads()
    call = arguments.paged_append(key, value, keys, values, faults, index, threads, factors)
    _call(_library().kvquant_quantize_append, call)


def paged_read(states: PagedStates, row: int, output: torch.Tensor, *, isa: str | None = None) -> None:
    """Same as `PagedStates.read`."""
    index, threads = _index(isa or _from_environment), torch.get_num_threads()
    _call(_library().kvquant_paged_read, arguments.paged_read(states, row, output, index, threads))


@lru_cache(maxsize=None)
def takes_prompts(isa: str | None = None) -> bool:
    """Whether `prompt_attention` runs: on processors with AVX-512 BF16. `isa` as in `decode_attention`."""
    return bool(_library().kvquant_level_takes_prompts(ctypes.c_int64(_index(isa or _from_environment))))


def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None, *, scaling: float
) -> torch.Tensor:
    """Same as `ops.prompt_attention`.

    Raises:
        ValueError: a dtype, a shape or strides that the kernel does not take.
        RuntimeError: the processor has no AVX-512 BF16.
    """
    batch, num_heads, n, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    expected = (1, num_kv_heads, kv_len, head_dim)
    for name, states in (("query", query), ("key", key), ("value", value)):
        fits = batch == 1 if name == "query" else tuple(states.shape) == expected
        if not fits or states.dtype != torch.bfloat16 or states.stride(3) != 1 or states.device.type != "cpu":
            raise ValueError(
                f"{name}: {tuple(states.shape)} of {states.dtype} on {states.device} is not allowed; expected "
                f"{expected if name != 'query' else '[1, num_heads, n, head_dim]'} of torch.bfloat16 on cpu"
            )
    if head_dim % 16 or num_heads % num_kv_heads or not 0 < n <= kv_len:
        raise ValueError(
            f"query: {tuple(query.shape)} does not fit keys {tuple(key.shape)}; expected a head_dim that is a "
            "multiple of 16, whole groups of query heads, and no more tokens than keys"
        )
    output = torch.empty((1, n, num_heads, head_dim), dtype=query.dtype)
    strides = [x.stride(i) * x.itemsize for x in (query, key, value) for i in (1, 2)]
    index, threads = _index(_from_environment), torch.get_num_threads()
    call = arguments.Prompt(
        *(x.data_ptr() for x in (query, key, value, output)), *strides, num_heads, num_kv_heads, n, kv_len, head_dim,
        window or 0, index, threads, scaling,
    )  # fmt: skip
    _call(_library().kvquant_prompt_attention, call)
    return output
