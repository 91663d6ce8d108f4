"""The points of the GPU suite: its plan, and a report that keeps every point when another one ends the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...config import KVQuantConfig
from ..checks import is_true
from ..facts import without_paths
from ..step import Shape


@dataclass(frozen=True)
class Plan:
    """The plan of the suite. `max_bytes` bounds the memory of one point, `cache_bytes` the caches compared at equal
    memory, `seconds` the whole suite, and `seconds_per_point` the rounds of one group of timings."""

    presets: tuple[str, ...] = ("int8", "fp8", "int4")
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    q_per_kv: tuple[int, ...] = (1, 8, 4)
    kv_heads: int = 8
    head_dim: int = 128
    other_head_dims: tuple[int, ...] = (64, 80, 96, 112, 192, 256)
    prompts: tuple[int, ...] = (4096, 16384)
    step_contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    split_contexts: tuple[int, ...] = (4096, 32768, 131072)
    splits: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    vocabulary: int = 128256
    memory_context: int = 8192
    max_bytes: int = 64 << 30
    cache_bytes: int = 16 << 30
    seconds: float = 460.0
    seconds_per_point: float = 1.5

    @property
    def longest(self) -> int:
        """The number of tokens that the model is made for."""
        return max(*self.step_contexts, *self.prompts, self.memory_context) + 64

    def configs(self, machine) -> dict[str, KVQuantConfig]:
        """The presets, on the machine's backend."""
        return {name: replace(KVQuantConfig.preset(name), backend=machine.backend) for name in self.presets}

    def shape(self, machine, batch: int = 1) -> Shape:
        """The shape of the model and of its cache."""
        return Shape(
            self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate, self.vocabulary,
            batch=batch, device=machine.device,
        )  # fmt: skip


class Deadline:
    """Seconds that are left for the whole suite."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


class DeviceLost(Exception):
    """The device no longer works in this process."""


class Report:
    """Checks, rows and omitted points. A row is kept only if all checks of its candidate passed.

    Work comes in independent points: an error in one is a failed check, and the others go on, in another process if
    this one cannot.

    Args:
        machine: tells whether the device still works.
        save: called before and after every point.
        kept: `state()` of a process that ended; the report goes on from it.
    """

    def __init__(self, machine=None, save: Callable[[], object] = lambda: None, kept: dict | None = None):
        kept = kept or {}
        self._machine, self._save = machine, save
        self.checks: list[dict] = kept.get("checks", [])
        self.skipped: list[dict] = kept.get("skipped", [])
        self.rows: dict[str, list[dict]] = kept.get("rows", {})
        self.points: list[dict] = kept.get("points", [])
        self._earlier = list(self.points)

    def state(self) -> dict:
        return {"rows": self.rows, "checks": self.checks, "skipped": self.skipped, "points": self.points}

    def attempt(self, where: dict, work: Callable[[], object]) -> None:
        """Do the work of one point, unless an earlier process has begun it.

        Raises:
            DeviceLost: this process cannot do more.
        """
        if where in self._earlier:
            return
        self.points.append(where)
        self._save()
        try:
            work()
        except DeviceLost:
            self._save()
            raise
        except Exception as error:
            self.fault(where, where.get("name", where["section"]), error)
        self._save()

    def each(self, section: str, places: Iterable[dict], deadline: Deadline, work: Callable[[dict], object]) -> None:
        """Do the work of a point at each place, while there is time."""
        for where in places:
            if deadline.left() < 0:
                self.skip(section, where, "no time left")
            else:
                self.attempt({"section": section, **where}, partial(work, where))

    def fault(self, where: dict, name: str, error: Exception) -> None:
        """Record the error of a candidate of ours; running out of memory is not a fault.

        Raises:
            DeviceLost: nothing else can be done after this error.
        """
        reason = _reason(error)
        if isinstance(error, torch.OutOfMemoryError):
            self.skip(where["section"], {**where, "name": name}, reason)
        else:
            self.accept(where, [is_true(name, f"runs: {reason}", False)])
        if self._machine is not None and not self._machine.is_alive():
            self._save()
            raise DeviceLost(reason)

    def accept(self, where: dict, checks: list[dict]) -> set[str]:
        """Record the checks made at `where`; returns the names of the candidates that passed all of theirs."""
        self.checks += [{**where, **check} for check in checks]
        names = {check["name"] for check in checks}
        return names - {check["name"] for check in checks if not check["passed"]}

    def add(self, section: str, rows: list[dict]) -> None:
        self.rows.setdefault(section, []).extend(rows)

    def skip(self, section: str, where: dict, reason: str | Exception) -> None:
        where = {key: value for key, value in where.items() if key != "section"}
        self.skipped.append(
            {"section": section, **where, "reason": reason if isinstance(reason, str) else _reason(reason)}
        )


def _reason(error: Exception) -> str:
    """The error in one line, because the log of a compiler has thousands."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return without_paths(text if len(text) < 600 else f"{text[:400]} .. {text[-200:]}")
