"""What the benchmarks share: interleaved timing, the machine's plain read, facts for the result file, the table.

Order of a benchmark: check, refuse if anything is wrong, then time, then print and save.

Timing is in rounds, so that a slow minute of the machine hits every candidate alike, and each round has an order of
its own, because a call is slower after some neighbours than after others. `PlainRead.flush` before every sample makes
each one start from memory, as in a model whose layers and weights push each other out of the caches. A figure is the
median over rounds; smallest and largest are kept beside it.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shlex
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_kvquant.huge_pages import with_huge_pages

MIN_ROUNDS = 3
WARM_UP_ROUNDS = 2
_PACKAGES = ("hf_kvquant", "torch", "transformers", "numpy", "optimum-quanto", "hqq")
# Reductions that touch every byte once; the fastest here is the plain read.
_READS = {
    "float32 sum": lambda buffer: buffer.view(torch.float32).sum(),
    "int64 sum": lambda buffer: buffer.view(torch.int64).sum(),
    "uint8 max": lambda buffer: buffer.max(),
}


# ---- timing --------------------------------------------------------------------------------------------------------


def time_interleaved(
    tasks: dict[str, Callable[[], object]], rounds: int, seconds: float, before: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every call of every task, in up to `rounds` rounds; `before` runs, untimed, before each call.

    Stops after `seconds`, though not before `MIN_ROUNDS` rounds are complete. The orders are the same in every run.
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
            start = time.perf_counter()
            tasks[name]()
            elapsed = time.perf_counter() - start
            if i >= 0:
                samples[name].append(elapsed)
    return samples


def summary(samples: list[float], unit: float = 1e-3) -> dict[str, float]:
    """Median, smallest and largest of samples in seconds, in units of `unit` seconds, and their number."""
    scaled = [sample / unit for sample in samples]
    return {"median": statistics.median(scaled), "min": min(scaled), "max": max(scaled), "n": len(scaled)}


class PlainRead:
    """The roof: how fast this machine reads memory when it does nothing else, with torch's threads.

    The fastest of `_READS` over a buffer larger than the last cache. That memory binds, not the reduction, shows in
    the same read of a buffer that fits in the L2 caches: it must be clearly faster (`memory_bound`).

    Args:
        max_bytes: the longest read that will be asked for.
    """

    def __init__(self, max_bytes: int):
        flush_bytes = max(2 * _last_cache_bytes(), 64 << 20)
        # Filled: untouched pages of zeros are all one page, which never leaves the cache.
        self._buffer = torch.full((_round_up(max_bytes, 64) + flush_bytes,), 1, dtype=torch.uint8)
        self._flushed = self._buffer[-flush_bytes:]
        in_cache = self._buffer[: (_l2_bytes() // 2 or 256 << 10) * torch.get_num_threads()]
        speeds = {name: self._buffer.nbytes / _best(read, self._buffer) for name, read in _READS.items()}
        self.method = max(speeds, key=speeds.get)
        self._read = _READS[self.method]
        self.bytes_per_s = speeds[self.method]
        self.in_cache_bytes_per_s = in_cache.nbytes / _best(self._read, in_cache, repeats=100)
        # As the storage of a cache has them; the baselines and what is read here have torch's ordinary pages.
        huge = with_huge_pages(torch.empty(flush_bytes, dtype=torch.uint8)).fill_(1)
        self.huge_pages_bytes_per_s = flush_bytes / _best(self._read, huge)

    def flush(self) -> None:
        """Push everything else out of the caches."""
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
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        read(buffer)
        samples.append(time.perf_counter() - start)
    return min(samples)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- checks --------------------------------------------------------------------------------------------------------


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """`|x - reference| / |reference|` in Euclidean norms, in float64; NaN and infinity give infinity."""
    x, reference = x.double(), reference.double()
    error = ((x - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")


def at_most(name: str, what: str, value: float, limit: float) -> dict:
    """One line of a check list."""
    return {"name": name, "check": what, "value": value, "limit": limit, "passed": bool(value <= limit)}


def is_true(name: str, what: str, passed: bool) -> dict:
    return {"name": name, "check": what, "passed": bool(passed)}


def refused(checks: list[dict]) -> bool:
    """Whether a check failed; then it says which, and nothing may be timed, printed or saved."""
    failed = [check for check in checks if not check["passed"]]
    if failed:
        print_table(
            f"REFUSED: {len(failed)} of {len(checks)} checks failed, so there are no figures",
            ["name", "check", "value", "limit"],
            [[c["name"], c["check"], _short(c.get("value")), _short(c.get("limit"))] for c in failed],
        )
    return bool(failed)


# ---- facts and files -----------------------------------------------------------------------------------------------


def document(benchmark: str, argv: list[str], arguments: dict, **fields) -> dict:
    """A result file: how it was made and on what, then `fields`."""
    return {
        "benchmark": benchmark,
        "command": command(benchmark, argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "arguments": arguments,
        **fields,
    }


def command(benchmark: str, argv: list[str]) -> str:
    """The command line without `--out`, and with file names for absolute paths."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return without_paths(shlex.join(["python", f"eval/bench_{benchmark}.py", *kept]))


def without_paths(text: str) -> str:
    """`text` with the folders of absolute paths left out."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\",]+/)+", "", text)


def machine() -> dict:
    """The processor and how busy it was, without a name or path of the host."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": {f"L{level} {kind}": f"{size >> 10} KiB" for level, kind, size in _caches()},
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    # Imported from a source tree, perhaps; torch knows its local build.
    return found | {"torch": torch.__version__}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _caches() -> list[tuple[int, str, int]]:
    """Level, kind and bytes of each cache that the first core sees; empty where the system does not say."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found.append((int(level), kind.lower(), int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)))
    return found


def _last_cache_bytes() -> int:
    return max((size for _, _, size in _caches()), default=32 << 20)


def _l2_bytes() -> int:
    return next((size for level, _, size in _caches() if level == 2), 0)


def write_json(path: str | Path, result: dict) -> None:
    """Whole or not at all."""
    beside = Path(f"{path}.part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table with its first column to the left and the others to the right."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
