"""A machine that executes PTX on the host: `Device` stands where the GPU does in hf_kvquant/backends/cuda.py.

What runs is what NVRTC emits with the package's options, not the source, so that inline assembly, options, the layout
of structs and the compiler's own transformations are checked, which the emulator of the sources cannot see. The
instructions are interpreted in numpy, each for all threads at once that execute it: a call of a test takes a tenth of
a second to a second, less than g++ would need to compile code made from a kernel's ten thousand instructions.

    threads    each has a program counter. Those with the lowest go first, so that branches come together again.
    warps      shuffles, votes, ldmatrix, mma and warp barriers wait for all 32 threads; block barriers for the block
    faults     addresses out of range or misaligned; registers and shared memory that nobody wrote; shared memory that
               a copy is on its way to, or that another thread wrote with no barrier between; threads that wait for
               ever; copies that nobody waited for; parameters of another size than the kernel's; from sm_90 on,
               accesses to global memory, or an end, without waiting for the kernels before

Not shown: ptxas, time, the order of global memory, and a write to shared memory before another thread has read there,
which the emulator of the sources finds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import ptx_instructions
import ptxas
import torch
from ptx_memory import Fault, Global, Shared
from ptx_text import SIZES, Instruction, Kernel, parse

from hf_kvquant.backends import gpu, nvrtc
from hf_kvquant.backends.specialisation import Specialisation


class Device:
    """A GPU of `arch` that executes PTX. `truncates`: sums of products are cut off as tensor cores do, instead of
    exact."""

    def __init__(self, arch: str = "sm_90", *, truncates: bool = False):
        self._arch = arch
        self._multiply = ptx_instructions.truncating_product if truncates else ptx_instructions.exact_product

    def launch(
        self,
        kernels: Mapping[str, Sequence[int]],
        kind: Specialisation,
        *arguments: ctypes.Structure | torch.Tensor | None,
        reads: Sequence[torch.Tensor | None] = (),
        writes: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Runs kernels, one after the other; the arguments are those of `emulator.Device.launch`.

        Raises:
            Fault: a kernel did what it must not.
        """
        for kernel, grid in kernels.items():
            code = module(nvrtc.KERNELS[kernel], kind, self._arch)[kernel]
            execute(
                code, grid, arguments, reads=reads, writes=writes, multiply=self._multiply,
                starts_early=gpu.starts_early(self._arch),
            )  # fmt: skip


@lru_cache(maxsize=None)
def module(source: str, kind: Specialisation, arch: str) -> dict[str, Kernel]:
    """The kernels of a source file, compiled once in a session."""
    return parse(ptxas.ptx(source, kind, arch))


def execute(
    kernel: Kernel,
    grid,
    arguments,
    *,
    reads=(),
    writes=(),
    multiply=ptx_instructions.exact_product,
    starts_early=False,
) -> None:
    """Runs `kernel`; the module says what `Device` checks. `starts_early`: kernels before it may be running."""
    given = [x for x in arguments if isinstance(x, torch.Tensor)]
    extents = [(*_extent(x), True) for x in (*given, *writes) if x is not None and x.numel()]
    extents += [(*_extent(x), False) for x in reads if x is not None and x.numel()]
    parameters = b"".join(
        bytes(x) if isinstance(x, ctypes.Structure) else (0 if x is None else x.data_ptr()).to_bytes(8, "little")
        for x in arguments
    )
    if len(parameters) != kernel.parameter_bytes:
        raise Fault(f"{kernel.name} has parameters of {kernel.parameter_bytes} bytes; {len(parameters)} were given")
    with np.errstate(all="ignore"):
        memory = np.frombuffer(parameters, np.uint8), Global(extents)
        Threads(kernel, tuple(grid), *memory, multiply, starts_early).run()


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and behind the last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Threads:
    """All threads of a launch: registers, program counters, and those that execute at the moment."""

    def __init__(self, kernel: Kernel, grid, parameters: np.ndarray, memory: Global, multiply, starts_early: bool):
        self._kernel, self._parameters, self._global = kernel, parameters, memory
        self.multiply_matrices = multiply
        self._threads, dynamic = kernel.launch
        x, y, z = (*grid, 1, 1)[:3]
        self._count = x * y * z * self._threads
        everyone = np.arange(self._count)
        block, thread = everyone // self._threads, everyone % self._threads
        self._special = {"%tid.x": thread, "%ctaid.x": block % x, "%ctaid.y": block // x % y}
        self._special |= {"%ctaid.z": block // (x * y), "%ntid.x": self._threads}
        self._special |= {"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z}
        self._symbols, at = dict(kernel.parameters), dynamic
        for name in kernel.dynamic_shared:
            self._symbols[name] = 0
        for name, (size, align) in kernel.shared.items():
            self._symbols[name] = at = -(-at // align) * align
            at += size
        self._shared = Shared(x * y * z, at, self._threads)
        self._registers: dict[str, np.ndarray] = {}
        # The bits of a register that nobody wrote; absent once all are written.
        self._unwritten: dict[str, np.ndarray] = {}
        self._copies: str | None = None
        self._place = np.zeros(self._count, np.int64)
        # Whether each thread has waited for the kernels before.
        self._waited = np.full(self._count, not starts_early)
        self._everyone = everyone
        self._now: np.ndarray | slice = slice(None)

    def run(self) -> None:
        end = len(self._kernel.code)
        waits = [ptx_instructions.waits_for(instruction) for instruction in self._kernel.code]
        stops = set(self._kernel.labels.values()) | {i for i, wait in enumerate(waits) if wait}
        actions: list = [None] * end
        while True:
            place = self._next(waits, end)
            if place is None:
                break
            while True:
                instruction = self._kernel.code[place]
                if instruction.opcode[0] in ("bra", "ret", "exit"):
                    self._branch(instruction, place, end)
                    break
                if actions[place] is None:
                    actions[place] = ptx_instructions.compiled(instruction)
                self._step(instruction, actions[place])
                place += 1
                if place in stops or place == end:
                    self._place[self._now] = place
                    break
        if pending := self._shared.pending():
            raise Fault(f"{self._kernel.name} ends with {pending} copies that nobody waited for")
        if not self._waited.all():
            raise Fault(f"{self._kernel.name}: threads end that did not wait for the kernels before")

    def _next(self, waits, end: int) -> int | None:
        """Chooses the threads that go next, and returns their place; None: all have ended."""
        live = self._place < end
        if not live.any():
            return None
        for place in np.unique(self._place[live]):
            here = self._place == place
            if waits[place] == ptx_instructions.WARP:
                here = np.repeat(here.reshape(-1, 32).all(1), 32)
            elif waits[place] == ptx_instructions.BLOCK:
                together = (here | ~live).reshape(-1, self._threads).all(1)
                here &= np.repeat(together, self._threads)
            if here.any():
                self._now = slice(None) if here.all() else np.flatnonzero(here)
                return int(place)
        waiting = [self._kernel.code[place].text for place in np.unique(self._place[live])]
        raise Fault(f"{self._kernel.name}: threads wait for ever at {waiting}")

    def _branch(self, instruction: Instruction, place: int, end: int) -> None:
        target = self._kernel.labels[instruction.operands[-1]] if instruction.opcode[0] == "bra" else end
        self._place[self._now] = np.where(self._guard(instruction), target, place + 1)

    def _guard(self, instruction: Instruction):
        return True if instruction.guard is None else self.read(instruction.guard, "pred") ^ instruction.negated

    def _step(self, instruction: Instruction, action) -> None:
        now = self._now
        try:
            if instruction.guard is not None:
                self._now = self._everyone[now][self._guard(instruction)]
            if instruction.guard is None or len(self._now):
                if self._copies_unwritten(instruction):
                    self._copies = "values"
                    action(self)
                    self._copies = "unwritten"
                    action(self)
                else:
                    action(self)
        except Fault as fault:
            raise Fault(f"{self._kernel.name}: `{instruction.text}` {fault}") from None
        finally:
            self._now, self._copies = now, None

    def _copies_unwritten(self, instruction: Instruction) -> bool:
        """Whether an instruction copies bits that nobody wrote, as the optimizer lets it where nobody uses them."""
        if not self._unwritten or not ptx_instructions.only_copies(instruction):
            return False
        sources = [name for operand in instruction.operands[1:] for name in np.atleast_1d(operand)]
        return any(self._has_unwritten(name) for name in sources if name[0] == "%" and name not in self._special)

    def _has_unwritten(self, name: str) -> bool:
        if name not in self._registers:
            self._registers[name] = self._empty(name)
        unwritten = self._unwritten.get(name)
        return unwritten is not None and bool(unwritten[self._now].any())

    # -- what instructions use ----------------------------------------------------------------------

    def read(self, operand: str, kind: str, *, spread: bool = False) -> np.ndarray:
        """An operand as numbers of a type of PTX, one per thread; of a constant a single one, unless `spread`."""
        dtype = ptx_instructions.TYPES[kind]
        negated = operand[0] == "!"
        operand = operand[1:] if negated else operand
        if operand in self._special:
            x = np.asarray(self._special[operand]).astype(f"u{dtype.itemsize}").view(dtype)
            x = x[self._now] if x.ndim else x
        elif operand[0] == "%":
            x = self._bits(operand)[self._now]
            if x.dtype != dtype:
                x = x.astype(f"u{dtype.itemsize}").view(dtype) if x.itemsize != dtype.itemsize else x.view(dtype)
        else:
            x = np.zeros((), dtype) if self._copies == "unwritten" else _constant(operand, dtype, self._symbols)
        if spread and not x.ndim:
            x = np.broadcast_to(x, len(self._everyone[self._now]))
        return ~x if negated else x

    def _bits(self, name: str) -> np.ndarray:
        unwritten, bits = self._has_unwritten(name), self._registers[name]
        if unwritten and (self._copies is None or bits.dtype == bool):
            raise Fault(f"reads {name}, which nobody wrote")
        if self._copies == "unwritten" and bits.dtype != bool:
            return self._unwritten.get(name, np.zeros_like(bits))
        return bits

    def _empty(self, name: str) -> np.ndarray:
        kind = self._kernel.registers[name if name in self._kernel.registers else name.rstrip("0123456789")]
        dtype = np.dtype(bool if kind == "pred" else f"u{SIZES[kind]}")
        self._unwritten[name] = np.full(self._count, True if kind == "pred" else np.iinfo(dtype).max, dtype)
        return np.zeros(self._count, dtype)

    def write(self, name: str, x: np.ndarray) -> None:
        """Numbers into a register; signed ones are extended by their sign."""
        if name == "_":
            return
        register = self._registers.get(name)
        if register is None:
            register = self._registers[name] = self._empty(name)
        if register.dtype != bool:
            x = np.asarray(x)
            if x.itemsize != register.itemsize:
                x = x.astype(f"{'i' if x.dtype.kind == 'i' else 'u'}{register.itemsize}")
            x = np.ascontiguousarray(x).view(register.dtype) if x.ndim else x.view(register.dtype)
        if self._copies == "unwritten":
            self._unwritten.setdefault(name, np.zeros_like(register))[self._now] = x
            return
        register[self._now] = x
        unwritten = self._unwritten.get(name)
        if unwritten is not None:
            unwritten[self._now] = 0
            if not unwritten.any():
                del self._unwritten[name]

    def load(self, space: str, address: str, dtype: np.dtype, count: int) -> np.ndarray:
        """`[threads, count]`"""
        at = self._addresses(address)
        if space == "param":
            size = dtype.itemsize * count
            return self._parameters[at[:, None] + np.arange(size)].view(dtype)
        if space == "shared":
            return self._shared.load(self._everyone[self._now], at, dtype, count)
        return self._global_now().load(at, dtype, count)

    def store(self, space: str, address: str, values: np.ndarray) -> None:
        if space == "shared":
            self._shared.store(self._everyone[self._now], self._addresses(address), values)
        else:
            self._global_now().store(self._addresses(address), values)

    def add_one_by_one(self, address: str, values: np.ndarray) -> np.ndarray:
        """Adds to global memory, thread after thread; returns what each found."""
        old, memory = np.empty_like(values), self._global_now()
        for i, at in enumerate(self._addresses(address)):
            old[i] = memory.load(np.array([at]), values.dtype, 1)[0, 0]
            memory.store(np.array([at]), (old[i] + values[i]).reshape(1, 1))
        return old

    def copy(self, to: str, source: str, size: int, valid: str) -> None:
        """Begins a copy of `size` bytes, of which those behind the first `valid` are zeros."""
        threads, take = self._everyone[self._now], self.read(valid, "u32", spread=True)
        if not np.isin(take, (0, size)).all():
            raise ptx_instructions.Unknown(f"cp.async of {take.max()} of {size} bytes")
        values, takes = np.zeros((len(threads), size // 4), np.uint32), take > 0
        values[takes] = self._global_now().load(self._addresses(source)[takes], values.dtype, size // 4)
        self._shared.copy(threads, self._addresses(to), values)

    def commit(self) -> None:
        self._shared.commit(self._everyone[self._now])

    def wait(self, left: int) -> None:
        self._shared.wait(self._everyone[self._now], left)

    def wait_for_grids(self) -> None:
        self._waited[self._now] = True

    def pass_barrier(self, of_block: bool) -> None:
        self._shared.warp_clock[self._now] += 1
        if of_block:
            self._shared.block_clock[self._now] += 1

    def _global_now(self) -> Global:
        if not self._waited[self._now].all():
            raise Fault("accesses global memory before it has waited for the kernels before")
        return self._global

    def _addresses(self, operand: str) -> np.ndarray:
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        at = self._bits(base)[self._now].astype(np.int64) if base[0] == "%" else self._symbols[base]
        return np.broadcast_to(np.asarray(at) + int(offset or 0), len(self._everyone[self._now]))


@lru_cache(maxsize=None)
def _number(text: str, dtype: np.dtype) -> np.ndarray:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
    else:
        bits = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.asarray(bool(bits))
    return np.asarray(bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def _constant(text: str, dtype: np.dtype, symbols: dict[str, int]) -> np.ndarray:
    return np.asarray(symbols[text], dtype) if text in symbols else _number(text, dtype)
