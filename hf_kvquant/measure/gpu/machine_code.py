"""Reads the machine code (SASS) of a compiled kernel: instructions, their waits, and the shortest path of a tile.

NVIDIA's disassembler gives the instructions; the wheel `nvidia-cuda-nvdisasm` installs it, and it needs no GPU. Stall
counts and scoreboards are in the upper bits of an instruction, which NVIDIA does not document. Their layout is that
of Volta and later GPUs, after Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018).
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

_TEXT = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
_UPPER = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L_x_\d+|\.text\.\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `stall`: cycles until the warp may issue the next one; `sets`: the scoreboards, 0 to 5, that it
    holds until its result is written, and until its operands are read; `waits`: the scoreboards that it waits for, as
    bits; `target`: the index of the instruction that a branch goes to."""

    text: str
    predicate: str = ""
    stall: int = 1
    sets: tuple[int | None, int | None] = (None, None)
    waits: int = 0
    target: int | None = None

    @property
    def opcode(self) -> str:
        """Its first word without modifiers: "HMMA"."""
        return re.split(r"[ .]", self.text, maxsplit=1)[0]

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow. A call of a subroutine is taken for an instruction without one; one
        of a label in the same kernel is a branch to it (code for sm_80 to sm_89 leaves loops so)."""
        if self.opcode in ("EXIT", "RET") or (self.opcode == "CALL" and self.target is not None):
            return bool(self.predicate)
        return self.opcode != "BRA" or self.is_conditional

    @property
    def is_conditional(self) -> bool:
        return bool(self.predicate) or re.match(r"BRA(\.\w+)* !?U?P\d", self.text) is not None or self.is_rare

    @property
    def is_rare(self) -> bool:
        """A branch that only a warp with diverged threads takes."""
        return self.text.startswith("BRA.DIV")


def program() -> Path | None:
    """The disassembler of the wheel."""
    folders = find_spec("nvidia").submodule_search_locations if find_spec("nvidia") else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("cu1*/bin/nvdisasm*"))), None)


def missing() -> str | None:
    """None if there is a disassembler, else how to get it."""
    return None if program() else "there is no nvdisasm; pip install 'nvidia-cuda-nvdisasm==13.*'"


def disassembled(cubin: bytes, kernel: str) -> list[Instruction]:
    """The instructions of `kernel`.

    Raises:
        RuntimeError: there is no disassembler, or it fails.
        ValueError: the code has no such kernel.
    """
    if reason := missing():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([program(), "-c", "-hex", file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr}")
    return parse(done.stdout, kernel)


def parse(text: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in the output of `nvdisasm -c -hex`.

    Raises:
        ValueError: it has no such kernel.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    lower: re.Match | None = None
    lines = iter(text.splitlines())
    if not any(line.startswith(f".text.{kernel}:") for line in lines):
        raise ValueError(f"kernel: {kernel!r} is not in the machine code")
    for line in lines:
        if line.startswith("//-----"):
            break
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(found)
        elif start := _TEXT.match(line):
            lower = start
        elif lower and (upper := _UPPER.match(line)):
            found.append(_instruction(lower, int(upper[1], 16) >> 41))
            lower = None
    return [_with_target(one, labels) for one in found]


def _instruction(lower: re.Match, control: int) -> Instruction:
    # From the lowest bit: stall (4), yield (1), the two scoreboards (3 each, 7: none), waits (6).
    written, read = (n if (n := control >> shift & 7) != 7 else None for shift in (5, 8))
    return Instruction(lower[3], (lower[2] or "").strip(), control & 15, (written, read), control >> 11 & 63)


def _with_target(one: Instruction, labels: dict[str, int]) -> Instruction:
    named = re.search(r"`\((\.L_x_\d+)\)", one.text) if one.opcode in ("BRA", "CALL") else None
    if not named:
        return one
    return replace(one, target=labels[named[1]])


Property = Callable[[Instruction], bool]


@dataclass(eq=False)
class Flow:
    """The basic blocks of a kernel, as ranges of instructions, and which may follow which."""

    code: Sequence[Instruction]
    blocks: list[range] = field(init=False)
    follow: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        starts = {0, *(one.target for one in self.code if one.target is not None)}
        starts |= {i + 1 for i, one in enumerate(self.code) if one.target is not None or not one.goes_on}
        bounds = [*sorted(start for start in starts if start < len(self.code)), len(self.code)]
        self.blocks = [range(a, b) for a, b in pairwise(bounds)]
        at = {block.start: i for i, block in enumerate(self.blocks)}
        self.follow = []
        for block in self.blocks:
            last = self.code[block[-1]]
            after = [at[block.stop]] if last.goes_on and block.stop in at else []
            if last.target is not None and not last.is_rare:
                after.append(at[last.target])
            self.follow.append(after)

    def shortest(self, begin: int, is_end: Callable[[int], bool], visits: Sequence[Property] = ()) -> list[int] | None:
        """The blocks of the path with fewest instructions from block `begin` to one for which `is_end` (reached by at
        least one step) that has an instruction with each property; its end's instructions are not counted."""
        has = self._has(tuple(visits))
        whole = (1 << len(visits)) - 1
        # A state is a block that is entered, and the properties that were met before it.
        queue: list[tuple[int, int, int, tuple | None]] = [(0, begin, 0, None)]
        done = set()
        while queue:
            length, block, met, path = heapq.heappop(queue)
            if path is not None and met | has[block] == whole and is_end(block):
                return _unrolled((block, path))
            if (block, met) in done:
                continue
            if path is not None:
                done.add((block, met))
            for after in self.follow[block]:
                now = met | has[block]
                if (after, now) not in done:
                    heapq.heappush(queue, (length + len(self.blocks[block]), after, now, (block, path)))
        return None

    @lru_cache(maxsize=None)  # noqa: B019
    def _has(self, visits: tuple[Property, ...]) -> list[int]:
        """For each block, the properties that its instructions have, as bits."""
        return [
            sum(1 << bit for bit, property in enumerate(visits) if any(property(self.code[i]) for i in block))
            for block in self.blocks
        ]

    def instructions(self, blocks: Sequence[int]) -> list[Instruction]:
        """The instructions of a path; only branches that are taken keep their target."""
        order = [i for block in blocks for i in self.blocks[block]]
        taken = (one.target == after for one, after in zip((self.code[i] for i in order), [*order[1:], None]))
        return [
            self.code[i] if kept or self.code[i].target is None else replace(self.code[i], target=None)
            for i, kept in zip(order, taken)
        ]

    def up_to_last(self, path: Sequence[int]) -> list[Instruction]:
        return self.instructions(path)[: -len(self.blocks[path[-1]])]

    def loops(self) -> list[int]:
        """The blocks that a backward branch goes to."""
        return sorted({after for i, follow in enumerate(self.follow) for after in follow if after <= i})


def _unrolled(path: tuple | None) -> list[int]:
    found = []
    while path is not None:
        block, path = path
        found.append(block)
    return found[::-1]


@dataclass(frozen=True)
class Paths:
    """The shortest way through a kernel: what is `before` its loop, one round of the `loop`, and what is `after`."""

    before: list[Instruction]
    loop: list[Instruction]
    after: list[Instruction]


def paths(code: Sequence[Instruction], visits: Sequence[Property], per: Property | None = None) -> Paths:
    """The paths around the loop that has an instruction with each property of `visits`, and the fewest instructions of
    those; with `per`, the fewest for each instruction that has this property (an unrolled loop does more in a round).

    Raises:
        ValueError: there is no such loop, or no way into it or out of it.
    """
    flow = Flow(code)
    found = [path for head in flow.loops() if (path := flow.shortest(head, head.__eq__, visits))]
    if not found:
        raise ValueError("no loop has all of the expected instructions")

    def price(path: list[int]) -> float:
        code = flow.up_to_last(path)
        return len(code) / (sum(map(per, code)) if per else 1)

    loop = min(found, key=price)
    head, inside = loop[0], set(loop)
    before = flow.shortest(0, inside.__contains__)
    leaves = [i for i, block in enumerate(flow.blocks) if flow.code[block[-1]].opcode == "EXIT"]
    after = flow.shortest(head, leaves.__contains__, [lambda one: one.opcode == "STG"])
    if before is None or after is None:
        raise ValueError("there is no path into the loop or out of it")
    # The last round is part of the way out.
    rest = [block for block in after if block not in inside]
    return Paths(flow.up_to_last(before), flow.up_to_last(loop), flow.instructions(rest))
