"""What the GPU suite needs of a GPU: facts, times by CUDA events, copy bandwidth, CUDA graphs, free memory.

A time is of the device alone: before every call the suite overwrites a buffer larger than the L2 cache, which also
gives the host time to enqueue the call, so that launches are not what is measured. Rounds are A B C A B C .., a figure
is a median. How long the host takes for a call is measured apart (`host_seconds`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import _bench
import torch

ROUNDS, MIN_ROUNDS, WARM_UP_ROUNDS = 25, 5, 3
HOST_CALLS = 200


class Gpu:
    """The current CUDA device.

    Raises:
        SystemExit: there is none.
    """

    backend = "cuda"

    def __init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        # Writing it takes longer than a few launches from Python, too.
        nbytes = max(4 * self._properties.L2_cache_size, 512 << 20)
        self._flushed = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict:
        p = self._properties
        return {
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_gib": p.total_memory / 2**30,
            "multiprocessors": p.multi_processor_count,
            "l2_mib": p.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "clock_mhz": _clock(),
            **self.bandwidth(),
        }

    @lru_cache(maxsize=None)  # noqa: B019
    def bandwidth(self, nbytes: int = 2 << 30) -> dict:
        """Bytes per second of a device-to-device copy (read and written ones counted) and of a plain read."""
        source = torch.ones(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        samples = self.samples({"copy": lambda: target.copy_(source), "read": lambda: source.sum()}, seconds=5)
        copy, read = (statistics.median(samples[name]) for name in ("copy", "read"))
        return {"copy_gb_per_s": 2 * source.nbytes / copy / 1e9, "read_gb_per_s": source.nbytes / read / 1e9}

    def samples(
        self, tasks: dict[str, Callable[[], object]], seconds: float, rounds: int = ROUNDS
    ) -> dict[str, list[float]]:
        """Seconds on the device of every call of every task; stops after `seconds`, not before MIN_ROUNDS rounds."""
        found = {name: [] for name in tasks}
        began = time.perf_counter()
        for i in range(-WARM_UP_ROUNDS, rounds):
            if i >= MIN_ROUNDS and time.perf_counter() - began > seconds:
                break
            events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in tasks}
            for name, task in tasks.items():
                self._flushed.fill_(i % 7)
                events[name][0].record()
                task()
                events[name][1].record()
            torch.cuda.synchronize()
            if i >= 0:
                for name, (start, end) in events.items():
                    found[name].append(start.elapsed_time(end) / 1e3)
        return found

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call`, captured in a CUDA graph after it was run for warm-up; its tensors stay where they are."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay():
            graph.replay()
            return result

        return replay

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _clock() -> int | None:
    """MHz of the multiprocessors now; None where the driver's Python package is missing."""
    try:
        return torch.cuda.clock_rate()
    except Exception:
        return None


def host_seconds(machine, call: Callable[[], object]) -> float:
    """Median seconds until a call returns on the host, while the device has enough to do."""
    samples = []
    for i in range(HOST_CALLS + 10):
        # The queue of a device is finite: a full one would be measured instead.
        if i % 50 == 0:
            machine.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    machine.synchronize()
    return statistics.median(samples[10:])


class Deadline:
    """Seconds that are left for the whole suite."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


class Report:
    """Checks, rows and what was left out. A row is kept only if all checks of its candidate passed."""

    def __init__(self):
        self.checks: list[dict] = []
        self.skipped: list[dict] = []
        self.rows: dict[str, list[dict]] = {}

    def accept(self, where: dict, checks: list[dict]) -> set[str]:
        """Notes the checks, made at `where`; the names of the candidates that passed all of theirs."""
        self.checks += [{**where, **check} for check in checks]
        names = {check["name"] for check in checks}
        return names - {check["name"] for check in checks if not check["passed"]}

    def add(self, section: str, rows: list[dict]) -> None:
        self.rows.setdefault(section, []).extend(rows)

    def skip(self, section: str, where: dict, reason: str | Exception) -> None:
        if isinstance(reason, Exception):
            reason = _bench.without_paths(f"{type(reason).__name__}: {reason}")
        self.skipped.append({"section": section, **where, "reason": reason})

    def failed(self) -> list[dict]:
        return [check for check in self.checks if not check["passed"]]
