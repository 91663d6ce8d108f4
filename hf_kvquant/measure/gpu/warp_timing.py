"""Predicts the cycles of a path of machine code: warps that issue in order, scoreboards, pipes, shared memory.

UNCALIBRATED: no GPU has confirmed a figure. Rates are those of the throughput table in the CUDA programming guide;
latencies are rounded from published measurements (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture via Microbenchmarking", 2024). Not modelled: instruction caches, conflicts of banks, the order in which
memory answers. Expect errors of 25 percent: compare versions of a kernel with it, and measure the better one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .machine_code import Instruction

SCHEDULERS = 4
# Cycles until the result of an instruction with a scoreboard is there.
LATENCY = {"LDS": 29, "LDSM": 33, "MUFU": 22, "LDC": 35, "S2R": 28, "SHFL": 25, "BAR": 30, "S2UR": 28, "R2UR": 12}
OTHER_LATENCY = 22
MEMORY_LATENCY = 700
# Cycles until operands have been read, for instructions that hold a scoreboard for it.
READ_LATENCY = 22
TAKEN_BRANCH = 10

_OPCODES = {
    "alu": "LOP3 PRMT IADD3 ISETP SHF LEA FMNMX FSETP SEL FSEL VOTE F2FP VIADD VIMNMX PLOP3 IABS P2R R2P SGXT BMSK",
    "imad": "IMAD",
    "fp32": "FFMA FMUL FADD",
    "fp16": "HMUL2 HADD2 HFMA2",
    "tensor": "HMMA",
    "special": "MUFU I2F F2I F2F POPC FLO I2FP",
    "memory": "LDS LDSM STS SHFL LDG STG LDGSTS S2R LDC ATOMG RED",
}
_PIPE = {opcode: pipe for pipe, opcodes in _OPCODES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Pipes:
    """Cycles for which an instruction keeps a pipe of its scheduler busy; `tensor`: an m16n8k16 with FP32 sums."""

    tensor: int
    fp32: int
    fp16: int
    alu: int = 2
    imad: int = 2
    special: int = 8
    memory: int = 2
    uniform: int = 2
    other: int = 1


# GeForce GPUs multiply FP16 with FP32 sums at half the rate of FP16 sums.
PIPES = {
    "sm_80": Pipes(tensor=8, fp32=2, fp16=1),
    "sm_86": Pipes(tensor=32, fp32=1, fp16=2),
    "sm_89": Pipes(tensor=32, fp32=1, fp16=2),
    "sm_90": Pipes(tensor=4, fp32=1, fp16=1),
}


def pipe(one: Instruction) -> str:
    if one.opcode.startswith("U"):
        return "uniform"
    if one.text.startswith("IMAD.MOV") or one.text.startswith("IMAD.U32"):
        return "fp32"
    return _PIPE.get(one.opcode, "other")


def wavefronts(one: Instruction) -> int:
    """Accesses of 128 bytes to the shared memory of the SM, without bank conflicts."""
    wide = 4 if ".128" in one.text else 2 if ".64" in one.text else 1
    if one.predicate == "@!PT":
        return 0
    if one.opcode in ("LDS", "STS", "LDGSTS"):
        return wide
    return {"LDSM": 4, "SHFL": 1}.get(one.opcode, 0)


@dataclass(frozen=True)
class _Step:
    """An instruction of a path, as the simulation sees it."""

    opcode: str
    stall: int
    sets: tuple[int | None, int | None]
    boards: tuple[int, ...]
    pipe: str
    rate: int
    latency: int
    wavefronts: int
    in_flight: int | None  # DEPBAR: the groups of copies that may be in flight


def _step(one: Instruction, pipes: Pipes) -> _Step:
    name = pipe(one)
    latency = MEMORY_LATENCY if one.opcode in ("LDG", "ATOMG") else LATENCY.get(one.opcode, OTHER_LATENCY)
    stall = max(1, one.stall) + TAKEN_BRANCH * (one.target is not None)
    boards = tuple(b for b in range(6) if one.waits >> b & 1)
    wait = re.match(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", one.text)
    rate, waves = getattr(pipes, name), wavefronts(one)
    return _Step(one.opcode, stall, one.sets, boards, name, rate, latency, waves, int(wait[1], 16) if wait else None)


class _Warp:
    def __init__(self, ready: int):
        self.at, self.rounds, self.ready = 0, 0, ready
        self.free = [0.0] * 6  # the cycle at which each scoreboard is free
        self.copy: float = 0  # the end of the copies that no group has yet
        self.groups: list[float] = []  # the end of each group of copies

    def next_issue(self, steps: Sequence[_Step], pipes: dict[str, float]) -> float:
        """The first cycle at which the next instruction can be issued."""
        step = steps[self.at]
        when = max(self.ready, pipes.get(step.pipe, 0))
        for board in step.boards:
            when = max(when, self.free[board])
        if step.in_flight is not None and len(self.groups) > step.in_flight:
            when = max(when, self.groups[-1 - step.in_flight])
        return when


def total_cycles(
    path: Sequence[Instruction],
    arch: str,
    warps: int = 1,
    rounds: int = 1,
    copy_bytes: float = 0.0,
    bytes_per_clock: float = float("inf"),
    apart: int = 0,
) -> int:
    """Cycles until `warps` warps on each scheduler of an SM have followed `path`, `rounds` times each.

    Args:
        copy_bytes: bytes that the copies (LDGSTS) of one round bring from memory.
        bytes_per_clock: what memory gives the SM.
        apart: cycles between the starts of two warps.
    """
    steps = [_step(one, PIPES[arch]) for one in path]
    copies = sum(step.opcode == "LDGSTS" for step in steps)
    copy_cycles = copy_bytes / copies / bytes_per_clock if copies else 0.0
    queues = [[_Warp(apart * (s + SCHEDULERS * w)) for w in range(warps)] for s in range(SCHEDULERS)]
    pipes: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
    now, end, shared, memory = 0, 0, 0.0, 0.0
    while any(queues):
        soonest = float("inf")
        for queue, busy_until in zip(queues, pipes):
            ready = [warp.next_issue(steps, busy_until) for warp in queue]
            chosen = next((i for i, when in enumerate(ready) if when <= now), None)
            if chosen is None:
                soonest = min(soonest, *ready) if ready else soonest
                continue
            soonest = now + 1
            # The warp goes to the end of the queue: loosely round robin.
            warp = queue.pop(chosen)
            step = steps[warp.at]
            busy_until[step.pipe] = now + step.rate
            done: float = now + step.latency
            if step.wavefronts:
                done += max(shared - now, 0.0)
                shared = max(shared, now) + step.wavefronts
            if step.opcode == "LDGSTS":
                memory = max(memory, now) + copy_cycles
                warp.copy = memory + MEMORY_LATENCY
            elif step.opcode == "LDGDEPBAR":
                warp.groups.append(warp.copy)
            for board, until in zip(step.sets, (done, now + READ_LATENCY)):
                if board is not None:
                    warp.free[board] = max(warp.free[board], until)
            warp.ready, warp.at = now + step.stall, warp.at + 1
            if warp.at == len(steps):
                warp.at, warp.rounds, end = 0, warp.rounds + 1, now + step.stall
            if warp.rounds < rounds:
                queue.append(warp)
        now = max(now + 1, -int(-soonest // 1)) if soonest < float("inf") else now + 1
    return end


def round_cycles(path: Sequence[Instruction], arch: str, warps: int = 1, **memory: float) -> float:
    """Cycles of one round of a loop that goes on: the rounds 6 to 18."""
    # Warps that start together would wait for the same pipes at the same time.
    first, last = (total_cycles(path, arch, warps, rounds, apart=37, **memory) for rounds in (6, 18))
    return (last - first) / 12
