"""The CPU backend: calls the library with ctypes; the structs are `arguments`.

The library has a plain C ABI, so that one build serves every Python and every torch; a call releases the GIL. The
level of machine instructions is the best that the processor has; the environment variable KVQUANT_CPU_ISA names
another.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from importlib.resources import files

import torch

from . import arguments

ISA_VARIABLE = "KVQUANT_CPU_ISA"
_STATUS = {1: "this processor lacks the requested level", 2: "out of memory"}


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
    for function, struct in (("attention", arguments.Attention), ("append", arguments.Append)):
        size = getattr(library, f"kvquant_{function}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(struct):
            raise OSError(f"{_path()} does not belong to this version of the package (size of {function} arguments)")
    library.kvquant_use_openmp(ctypes.c_void_p(_openmp_parallel()))
    return library


@lru_cache(maxsize=None)
def _openmp_parallel() -> int | None:
    """Address of `GOMP_parallel` of the OpenMP runtime that torch uses, or None if it has no such runtime.

    Sharing torch's threads is what keeps the machine from being oversubscribed: they spin for a while after each of
    torch's operators. The name is the border of GNU's and LLVM's runtimes; the process finds torch's, as torch does.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@lru_cache(maxsize=None)
def _levels() -> tuple[dict[str, int], tuple[str, ...]]:
    """Numbers of all levels by name, ascending, and the names of those that this processor runs."""
    library, numbers = _library(), {}
    while (name := library.kvquant_level_name(ctypes.c_int64(len(numbers)))) is not None:
        numbers[name.decode()] = len(numbers)
    return numbers, tuple(n for n, i in numbers.items() if library.kvquant_level_runs(ctypes.c_int64(i)))


@lru_cache(maxsize=None)
def _level(name: str | None) -> int:
    numbers, runs = _levels()
    name = name or runs[-1]
    if name not in runs:
        what = "does not run on this processor" if name in numbers else "is unknown"
        raise ValueError(f"{ISA_VARIABLE}: level {name!r} {what}; expected one of {list(runs)}")
    return numbers[name]


_from_environment = os.environ.get(ISA_VARIABLE) or None


def isa() -> str:
    """The level of machine instructions that calls use.

    Raises:
        ValueError: KVQUANT_CPU_ISA names a level that is unknown or does not run here.
    """
    return list(_levels()[0])[_level(_from_environment)]


def unavailable() -> str | None:
    """None if this backend can run, else the reason why it cannot."""
    try:
        isa()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def info() -> dict:
    """What `hf-kvquant info` says about this backend."""
    return {
        "isa": isa(),
        "available": list(_levels()[1]),
        "threads": torch.get_num_threads(),
        "thread pool": "own" if _openmp_parallel() is None else "torch's OpenMP",
        "library": _path(),
    }


def _call(function, struct: ctypes.Structure) -> None:
    status = function(ctypes.byref(struct))
    if status:
        raise MemoryError(_STATUS[status]) if status == 2 else RuntimeError(_STATUS[status])


def _check_length(length: torch.Tensor | None, least: int) -> None:
    """Whether a length that stands in memory lies in the storage; the kernels bound it from above only."""
    if length is not None and int(length) < least:
        raise ValueError(f"length: {int(length)} is not allowed; expected {least} or more")


def decode_attention(query, keys, values, mask=None, s_aux=None, *, scaling, softcap=0.0, isa=None):
    """`reference.decode_attention` (which see); `isa` names a level, by default the best.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit, by name.
    """
    call, output, logsumexp = arguments.attention(
        query, keys, values, mask, s_aux, scaling, softcap, _level(isa or _from_environment), torch.get_num_threads()
    )
    _check_length(keys.device_length, query.shape[2])
    _call(_library().kvquant_decode_attention, call)
    return output, logsumexp


def quantize_append(key, value, keys, values, faults, padding=None, *, start, isa=None):
    """`reference.quantize_append` (which see); `isa` names a level, by default the best.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit, by name.
    """
    level, threads = _level(isa or _from_environment), torch.get_num_threads()
    call = arguments.append(key, value, keys, values, faults, padding, start, level, threads)
    _check_length(keys.device_length, 0)
    _call(_library().kvquant_quantize_append, call)
