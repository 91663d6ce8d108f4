"""Measurements in processes of their own, and the memory that a cache adds to its process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .caches import Candidate
from .facts import without_paths
from .step import Shape, build_model, filled, first_logits

STEPS = 2


def measure_memory(shape: Shape, candidates: Sequence[Candidate], length: int, room: int) -> dict[str, dict]:
    """The result of `_measure` for each candidate by name, or the reason why there is none."""
    if not sys.platform.startswith("linux"):
        return {candidate.name: {"reason": f"not measured on {sys.platform}"} for candidate in candidates}
    found = {}
    for candidate in candidates:
        try:
            found[candidate.name] = in_process(_measure, shape, candidate, length, room, torch.get_num_threads())
        except Exception as error:
            found[candidate.name] = {"reason": reason(error)}
    return found


def in_process(function: Callable[..., dict], *args: Any) -> dict:
    """The result of a function in a new process.

    On Linux it forks from a fresh server that has run nothing; a fork of this process would inherit dead OpenMP
    threads.
    """
    is_linux = sys.platform.startswith("linux")
    context: Any = multiprocessing.get_context("forkserver" if is_linux else "spawn")
    if is_linux:
        context.set_forkserver_preload(["hf_kvquant.measure", "transformers.models.llama.modeling_llama"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def reason(error: Exception) -> str:
    return without_paths(f"{type(error).__name__}: {error}")


def _measure(shape: Shape, candidate: Candidate, length: int, room: int, threads: int) -> dict:
    """The resident memory that the cache adds, and the peak of two decode steps."""
    torch.set_num_threads(threads)
    model = build_model(shape, length + room, candidate.dtype)
    # A short cache comes first, because code that is loaded at first use is not part of a cache.
    first_logits(model, filled(candidate, model.config, shape, 64, STEPS), shape, STEPS)
    before = resident()
    cache = filled(candidate, model.config, shape, length, room)
    after = resident()
    new_peak()
    first_logits(model, cache, shape, STEPS)
    return {"cache_mb": (after - before) / 1e6, "step_peak_mb": (resident("VmHWM") - before) / 1e6}


def new_peak() -> None:
    """Let the peak (VmHWM) start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, after freed memory has gone back to the system."""
    if field == "VmRSS":
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
