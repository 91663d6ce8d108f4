"""Measures the time of calls on the processor in interleaved rounds, with the machine's plain read as the roof.

Timing is in rounds, so that a slow minute of the machine affects every task alike, and each round has an order of its
own, because a call is slower after some neighbours than after others. `PlainRead.flush` before every sample makes each
one start from memory, as in a model whose layers and weights push each other out of the caches. A figure is the median
over rounds; smallest and largest are kept beside it. `gpu.clock` times the same rounds with CUDA events.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..huge_pages import with_huge_pages
from .facts import processor_caches

MIN_ROUNDS = 3
WARM_UP_ROUNDS = 2
# Reductions that read every byte once; the fastest one here is the plain read.
_READS = {
    "float32 sum": lambda buffer: buffer.view(torch.float32).sum(),
    "int64 sum": lambda buffer: buffer.view(torch.int64).sum(),
    "uint8 max": lambda buffer: buffer.max(),
}


def seconds_of(call: Callable[[], object]) -> float:
    """The seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_interleaved(
    tasks: dict[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], Any]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Seconds of every call of every task, in up to `rounds` rounds; `before` runs, untimed, before each call.

    `clock` calls a task and returns the seconds that it took. Stops after `seconds`, though not before `MIN_ROUNDS`
    rounds are complete. The orders are the same in every run.
    """
    samples = {name: [] for name in tasks}
    order = random.Random(0)
    deadline = None
    for i in range(-WARM_UP_ROUNDS, rounds):
        if i == 0:
            deadline = time.perf_counter() + seconds
        elif i >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name in order.sample(list(tasks), len(tasks)):
            before()
            elapsed = clock(tasks[name])
            if i >= 0:
                samples[name].append(elapsed)
    return samples


def summary(samples: list[float], unit: float = 1e-3) -> dict[str, float]:
    """Median, smallest and largest of samples in seconds, in units of `unit` seconds, and their number."""
    scaled = [sample / unit for sample in samples]
    return {"median": statistics.median(scaled), "min": min(scaled), "max": max(scaled), "n": len(scaled)}


class PlainRead:
    """The roof: how fast this machine reads memory when it does nothing else, with torch's threads.

    It is the fastest of `_READS` over a buffer larger than the last cache. The same read of a buffer that fits in the
    L2 caches must be clearly faster, which shows that memory is the limit, not the reduction (`memory_bound`).

    Args:
        max_bytes: the longest read that will be asked for.
    """

    def __init__(self, max_bytes: int):
        caches = processor_caches()
        flush_bytes = max(2 * max((size for _, _, size in caches), default=32 << 20), 64 << 20)
        l2_bytes = next((size for level, _, size in caches if level == 2), 512 << 10)
        # Filled, because untouched pages of zeros are all the same page, which never leaves the cache.
        self._buffer = torch.full((_round_up(max_bytes, 64) + flush_bytes,), 1, dtype=torch.uint8)
        self._flushed = self._buffer[-flush_bytes:]
        in_cache = self._buffer[: l2_bytes // 2 * torch.get_num_threads()]
        speeds = {name: self._buffer.nbytes / _best(read, self._buffer) for name, read in _READS.items()}
        self.method = max(speeds, key=speeds.get)
        self._read = _READS[self.method]
        self.bytes_per_s = speeds[self.method]
        self.in_cache_bytes_per_s = in_cache.nbytes / _best(self._read, in_cache, repeats=100)
        # Huge pages like those of a cache's storage; the baselines and the plain read have torch's ordinary pages.
        huge = with_huge_pages(torch.empty(flush_bytes, dtype=torch.uint8)).fill_(1)
        self.huge_pages_bytes_per_s = flush_bytes / _best(self._read, huge)

    def flush(self) -> None:
        """Push all other data out of the caches."""
        self._read(self._flushed)

    def reader(self, nbytes: int) -> Callable[[], object]:
        """A call that reads `nbytes` (rounded up to 8)."""
        part = self._buffer[: _round_up(nbytes, 8)]
        return lambda: self._read(part)

    def facts(self) -> dict:
        return {
            "method": f"torch, {self.method}",
            "gb_per_s": self.bytes_per_s / 1e9,
            "huge_pages_gb_per_s": self.huge_pages_bytes_per_s / 1e9,
            "in_cache_gb_per_s": self.in_cache_bytes_per_s / 1e9,
            "memory_bound": self.in_cache_bytes_per_s > 1.5 * self.bytes_per_s,
        }


def _best(read: Callable, buffer: torch.Tensor, repeats: int = 5) -> float:
    return min(seconds_of(lambda: read(buffer)) for _ in range(repeats))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
