"""Predicts the time of decode attention on GPUs that are not here, from the machine code of its two kernels.

UNCALIBRATED, as warp_timing.py is. A block takes the simulated cycles of what is before and after its loop and of its
tiles, or as long as memory needs for its bytes, which all running blocks share; multiprocessors take a new block when
one is done. The list of columns with exact copies counts as one more split. Clocks and bandwidths are published or
estimated, not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...backends import gpu as backend
from ...backends import nvrtc
from ...backends.arguments import DTYPES
from ...backends.specialisation import specialisation, split_length
from ...config import KVQuantConfig
from ...quantization import FORMATS
from . import goals, machine_code, warp_timing
from .machine_code import Instruction, Paths, disassembled, paths


@dataclass(frozen=True)
class GpuFacts:
    """A GPU. `read_gb_per_s`: what a plain read reaches; `copy_gb_per_s`: what the goals are relative to, read and
    written bytes counted; `shared_kib`: of one multiprocessor."""

    arch: str
    multiprocessors: int
    clock_ghz: float
    read_gb_per_s: float
    copy_gb_per_s: float
    shared_kib: int

    @property
    def bytes_per_clock(self) -> float:
        """Bytes that a multiprocessor has to read per clock to use all of the bandwidth."""
        return self.read_gb_per_s / self.clock_ghz / self.multiprocessors


GPUS = {
    "A100": GpuFacts("sm_80", 108, 1.41, 1790, 1700, 164),
    "H100": GpuFacts("sm_90", 132, 1.755, 3100, 3000, 228),
    "H200": GpuFacts("sm_90", 132, 1.755, 4500, 4300, 228),
    "RTX 3090": GpuFacts("sm_86", 82, 1.695, 860, 840, 100),
    "RTX 4090": GpuFacts("sm_89", 128, 2.52, 940, 910, 100),
}
# Registers and threads of a multiprocessor, and shared memory that a block takes besides its own.
REGISTERS, THREADS, RESERVED_BYTES = 65536, {"sm_86": 1536, "sm_89": 1536}, 1024
# What L2 gives one multiprocessor per clock.
L2_BYTES_PER_CLOCK = 64.0
# Before the first block of a kernel starts, and between two kernels of a stream.
START_US, BETWEEN_US = 2.0, 1.0
# The part of the time between two kernels of a CUDA graph that an early start of the second hides (gpu.starts_early):
# two empty kernels at 1,755 MHz, as measured in https://github.com/pegainfer-project/pegainfer/issues/569.
HIDDEN_US = 0.96
# A good BF16 kernel: the share of the readable bandwidth that it reaches, and its overhead.
BF16_SHARE, BF16_OVERHEAD_US = 0.93, 4.0


@dataclass(frozen=True, eq=False)
class Kernel:
    """What the code of decode attention says: paths, blocks per multiprocessor by registers, shared memory of a block,
    columns of a round of the loop, bytes of one column in memory."""

    arch: str
    attention: Paths
    merge: Paths
    registers: int
    shared_bytes: int
    warps: int
    columns: int
    column_bytes: float

    @classmethod
    def of(cls, name: str, arch: str, head_dim: int = 128) -> Kernel:
        """Compile the kernels of a preset or a YAML file for BF16 models, or read them from the disk cache, and
        disassemble them.

        Raises:
            RuntimeError: there is no disassembler.
        """
        config = KVQuantConfig.load(name)
        sides = [side.resolve(head_dim) for side in (config.keys, config.values)]
        keys, values = sides
        kind = specialisation(DTYPES[torch.bfloat16], keys, values, head_dim, head_dim)
        compiled = nvrtc.compiled("decode_attention.cu", kind, arch)
        attention = paths(disassembled(compiled.cubin, "decode_attention_kernel"), TILE, is_product)
        merge = paths(disassembled(compiled.cubin, "merge_splits_kernel"), [is_slice], is_slice)
        usage, launch = compiled.usage["decode_attention_kernel"], compiled.launches["decode_attention_kernel"]
        row_bytes = sum(FORMATS[side.format].bits for side in sides) * head_dim // 8
        column_bytes = sum(side.bits_per_element(head_dim) for side in sides) * head_dim / 8
        columns, warps = tile_columns(attention.loop, row_bytes), launch.threads // 32
        return cls(arch, attention, merge, usage.registers, launch.shared_bytes, warps, columns, column_bytes)

    def blocks(self, gpu: GpuFacts) -> int:
        """Blocks that a multiprocessor runs at once."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_memory = (gpu.shared_kib << 10) // (self.shared_bytes + RESERVED_BYTES)
        return min(by_registers, by_memory, THREADS.get(gpu.arch, 2048) // threads)

    def _warps_of_a_scheduler(self, blocks: int) -> int:
        return max(1, self.warps * blocks // warp_timing.SCHEDULERS)

    @lru_cache(maxsize=None)  # noqa: B019
    def tile_cycles(self, blocks: int, bytes_per_clock: float = float("inf")) -> float:
        """Cycles of a round of the loop with `blocks` blocks on a multiprocessor."""
        memory = {"copy_bytes": self.columns * self.column_bytes, "bytes_per_clock": bytes_per_clock}
        return warp_timing.round_cycles(self.attention.loop, self.arch, self._warps_of_a_scheduler(blocks), **memory)

    def bytes_per_clock(self, blocks: int) -> float:
        """Bytes that the loop takes per clock and multiprocessor if memory always has them."""
        return blocks * self.warps * self.columns * self.column_bytes / self.tile_cycles(blocks)

    @lru_cache(maxsize=None)  # noqa: B019
    def fixed_cycles(self, blocks: int) -> int:
        """Cycles of a block before and after its loop."""
        path = self.attention.before + self.attention.after
        return warp_timing.total_cycles(path, self.arch, self._warps_of_a_scheduler(blocks))


def is_product(one: Instruction) -> bool:
    """Whether an instruction multiplies matrices."""
    return one.opcode == "HMMA"


# What the loop over tiles has: copies, products, exponentials. Loops over lists of columns have fewer products.
TILE = (lambda one: one.opcode == "LDGSTS", is_product, lambda one: one.opcode == "MUFU")


def is_slice(one: Instruction) -> bool:
    """Whether an instruction loads the sums of a slice."""
    return one.opcode == "LDG" and ".128" in one.text


def tile_columns(loop: Sequence[Instruction], row_bytes: int) -> int:
    """The columns of one round, from the bytes that 32 lanes copy; lanes without a piece of a row copy none."""
    copied = sum(32 * (16 if ".128" in one.text else 8) for one in loop if one.opcode == "LDGSTS")
    return copied // row_bytes // 16 * 16


def schedule(blocks: int, places: int, multiprocessors: int, cycles: Callable[[int, int], float]) -> float:
    """Cycles until `blocks` blocks of equal work are done; `cycles(n, running)`: those of a block beside n - 1 others,
    while `running` of them run on all multiprocessors."""
    running: list[list[float]] = [[] for _ in range(multiprocessors)]  # the work left of each block, from 1 to 0
    left, now = blocks, 0.0
    while True:
        # The emptiest multiprocessor takes the next block, so that those of the last wave are spread out.
        for beside in range(places):
            for one in running:
                if left and len(one) == beside:
                    one.append(1.0)
                    left -= 1
        if not any(running):
            return now
        count = sum(map(len, running))
        apart = min(min(one) * cycles(len(one), count) for one in running if one)
        now += apart
        for one in running:
            if not one:
                continue
            speed = apart / cycles(len(one), count)
            one[:] = [work - speed for work in one if work - speed > 1e-9]


def attention_us(kernel: Kernel, gpu: GpuFacts, batch: int, context: int, kv_heads: int, split: int) -> float:
    """Microseconds of the attention kernel, without the start of the launch."""
    heads = batch * kv_heads
    stored, copies = -(-context // split), 1
    tiles = -(-min(split, context) // kernel.warps // kernel.columns)
    blocks, places = heads * (stored + copies), kernel.blocks(gpu)
    each = kernel.warps * kernel.columns * kernel.column_bytes

    def cycles(beside: int, running: int) -> float:
        rate = min(L2_BYTES_PER_CLOCK / beside, gpu.bytes_per_clock * gpu.multiprocessors / running)
        return kernel.fixed_cycles(beside) + tiles * max(kernel.tile_cycles(beside), each / rate)

    return schedule(blocks, places, gpu.multiprocessors, cycles) / gpu.clock_ghz * 1e-3


def merge_us(kernel: Kernel, gpu: GpuFacts, batch: int, context: int, heads: int, split: int) -> float:
    """Microseconds of the kernel that merges the splits."""
    slices = -(-context // split) + 3
    at_once = sum(map(is_slice, kernel.merge.loop))
    rounds = -(-slices // (kernel.warps * at_once))
    simulate = warp_timing.total_cycles
    fixed = simulate([*kernel.merge.before, *kernel.merge.after], kernel.arch)
    waves = -(-batch * heads // gpu.multiprocessors)
    return waves * (fixed + simulate(kernel.merge.loop, kernel.arch, rounds=rounds)) / gpu.clock_ghz * 1e-3


def call_us(
    kernel: Kernel,
    gpu: GpuFacts,
    batch: int,
    context: int,
    split: int | None = None,
    kv_heads: int = 8,
    q_per_kv: int = 4,
    in_step: bool = False,
) -> float:
    """Microseconds of a call on the device, both kernels.

    Args:
        split: columns of a block, by default the backend's.
        in_step: what the call adds to a captured step, behind the append, instead of a call alone.
    """
    split = split or split_length(context, kv_heads)
    attention = attention_us(kernel, gpu, batch, context, kv_heads, split)
    between = BETWEEN_US - (HIDDEN_US if backend.starts_early(kernel.arch) else 0.0)
    start = between if in_step else START_US
    return start + attention + between + merge_us(kernel, gpu, batch, context, kv_heads * q_per_kv, split)


def bf16_us(gpu: GpuFacts, batch: int, context: int, kv_heads: int = 8, head_dim: int = 128) -> float:
    """Microseconds of a good BF16 kernel over the same tokens."""
    nbytes = 4 * batch * kv_heads * context * head_dim
    return nbytes / (BF16_SHARE * gpu.read_gb_per_s * 1e3) + BF16_OVERHEAD_US


def missing() -> str | None:
    """None if kernels can be compiled and disassembled here, else what is missing and how to get it."""
    return nvrtc.missing() or machine_code.missing()


def loop_facts(kernel: Kernel) -> dict:
    """What the code's loop over plain tiles says; `before` and `after`: instructions of a warp outside of it."""
    each = range(1, 5)
    share = 16 / kernel.columns
    return {
        "arch": kernel.arch,
        "columns": kernel.columns,
        "instructions": len(kernel.attention.loop) * share,
        "wavefronts": sum(map(warp_timing.wavefronts, kernel.attention.loop)) * share,
        "registers": kernel.registers,
        "before": len(kernel.attention.before),
        "after": len(kernel.attention.after),
        "cycles": [kernel.tile_cycles(blocks) for blocks in each],
        "bytes_per_clock": [kernel.bytes_per_clock(blocks) for blocks in each],
    }


def call_facts(name: str, kernel: Kernel, gpu: GpuFacts, batch: int, context: int, kv_heads: int = 8) -> dict:
    """The predicted time of a call alone, and in a captured step, and the goals for the first; None for a goal that is
    not set for this preset, or config, or for this context."""
    nbytes = batch * kv_heads * context * kernel.column_bytes
    us, in_step = (call_us(kernel, gpu, batch, context, kv_heads=kv_heads, in_step=x) for x in (False, True))
    bf16 = bf16_us(gpu, batch, context, kv_heads)
    has_goals = name in goals.SHARE_OF_COPY
    limit = goals.time_limit(name, nbytes, gpu.copy_gb_per_s) if has_goals and context >= goals.TIME_FROM else None
    ratio = goals.OVER_BF16[name] if has_goals and context >= goals.BF16_FROM else None
    met = (limit is None or us <= limit) and (ratio is None or us / bf16 <= ratio)
    share = nbytes / us * 1e-3 / gpu.copy_gb_per_s
    return {
        "us": us,
        "us_in_step": in_step,
        "limit_us": limit,
        "over_bf16": us / bf16,
        "limit_over_bf16": ratio,
        "share_of_copy": share,
        "met": met if has_goals else None,
    }
