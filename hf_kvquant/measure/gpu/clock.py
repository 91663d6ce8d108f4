"""Measures the time of calls on a GPU: the rounds of `measure.clock` with CUDA events; also bandwidth, graphs, memory.

A time is that of the device alone: before every call the suite reads a buffer larger than the L2 cache, which gives
the host time to enqueue the call, so that launches are not measured. It reads, because tens of MB of written lines
would go back to memory while the call is timed. Rounds are A B C A B C .., and a figure is a median. The time that the
host takes for a call is measured separately (`host_seconds`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from ...backends import nvrtc
from ..clock import seconds_of, summary

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
        # Large enough that reading it takes longer than a few launches from Python.
        nbytes = max(4 * self._properties.L2_cache_size, 512 << 20)
        self._flushed = torch.zeros(nbytes // 4, device=self.device)
        self._flush_sum = torch.zeros((), device=self.device)

    def facts(self) -> dict:
        p = self._properties
        return {
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_gib": p.total_memory / 2**30,
            "multiprocessors": p.multi_processor_count,
            "l2_mib": p.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "driver_cuda": torch._C._cuda_getDriverVersion(),  # type: ignore[attr-defined]
            "nvrtc": nvrtc.missing() or nvrtc.version_name(),
            "clock_mhz": _clock(),
            **self.bandwidth(),
        }

    @lru_cache(maxsize=None)  # noqa: B019
    def bandwidth(self, nbytes: int = 2 << 30) -> dict:
        """Bytes per second of a device-to-device copy (read and written ones counted) and of a plain read."""
        source = torch.ones(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        samples = self.samples({"copy": lambda: target.copy_(source), "read": lambda: source.sum()}, seconds=5)
        copy, read = (median(samples[name]) for name in ("copy", "read"))
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
                torch.sum(self._flushed, dim=0, out=self._flush_sum)
                events[name][0].record()
                task()
                events[name][1].record()
            torch.cuda.synchronize()
            if i >= 0:
                for name, (start, end) in events.items():
                    found[name].append(start.elapsed_time(end) / 1e3)
        return found

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call`, captured in a CUDA graph after warm-up runs; its tensors stay at their addresses."""
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

    def is_alive(self) -> bool:
        """False after a fault such as an address out of range, which ends all work of the process on the device."""
        try:
            torch.cuda.synchronize()
            return torch.ones(1, device=self.device).item() == 1
        except RuntimeError:
            return False


def _clock() -> int | None:
    """The present clock of the multiprocessors in MHz; None if the driver's Python package is missing."""
    try:
        return torch.cuda.clock_rate()
    except Exception:
        return None


def host_seconds(machine, call: Callable[[], object]) -> float:
    """Median seconds until a call returns on the host, while the device has enough to do."""
    samples = []
    for i in range(HOST_CALLS + 10):
        # The queue of a device is finite, and a full one would be measured instead.
        if i % 50 == 0:
            machine.synchronize()
        samples.append(seconds_of(call))
    machine.synchronize()
    return median(samples[10:])


def median(samples: list[float]) -> float:
    return summary(samples, 1.0)["median"]
