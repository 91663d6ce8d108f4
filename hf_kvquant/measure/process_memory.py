"""The memory that a cache adds to its process, measured in a separate process for every cache."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .caches import Candidate
from .facts import without_paths
from .step import Shape, build_model, filled, first_logits

STEPS = 2


def measure_memory(shape: Shape, candidates: Sequence[Candidate], length: int, room: int) -> dict[str, dict]:
    """The result of `_measure` for each candidate by name, or the reason why there is none.

    The processes fork from a fresh server that has run nothing; a fork of this one would inherit dead OpenMP threads.
    """
    if not sys.platform.startswith("linux"):
        return {candidate.name: {"reason": f"not measured on {sys.platform}"} for candidate in candidates}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_kvquant.measure", "transformers.models.llama.modeling_llama"])
    found = {}
    for candidate in candidates:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                task = pool.submit(_measure, shape, candidate, length, room, torch.get_num_threads())
                found[candidate.name] = task.result()
            except Exception as error:
                found[candidate.name] = {"reason": reason(error)}
    return found


def reason(error: Exception) -> str:
    return without_paths(f"{type(error).__name__}: {error}")


def _measure(shape: Shape, candidate: Candidate, length: int, room: int, threads: int) -> dict:
    """The resident memory that the cache adds, and the peak of two decode steps."""
    torch.set_num_threads(threads)
    model = build_model(shape, length + room, candidate.dtype)
    # A short cache comes first, because code that is loaded at first use is not part of a cache.
    first_logits(model, filled(candidate, model.config, shape, 64, STEPS), shape, STEPS)
    before = _resident()
    cache = filled(candidate, model.config, shape, length, room)
    after = _resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    first_logits(model, cache, shape, STEPS)
    return {"cache_mb": (after - before) / 1e6, "step_peak_mb": (_resident("VmHWM") - before) / 1e6}


def _resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, after freed memory has gone back to the system."""
    if field == "VmRSS":
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
