"""The memory of the PTX machine: the tensors of a launch, and the shared memory of its blocks.

Accesses are arrays, one element per thread. What hardware would let pass, or answer with garbage, is a Fault.
"""

from __future__ import annotations

import ctypes

import numpy as np

# Shared memory is watched in cells of two bytes, the smallest access there.
CELL = 2
_UNWRITTEN, _IN_FLIGHT = np.iinfo(np.int32).max, np.iinfo(np.int32).max - 1


class Fault(RuntimeError):
    """What a kernel did wrong."""


class Global:
    """The bytes from the first to the last element of each tensor, at their addresses; `writable` of each."""

    def __init__(self, extents: list[tuple[int, int, bool]]):
        self._reads = _Regions([(begin, end) for begin, end, _ in extents])
        self._writes = _Regions([(begin, end) for begin, end, writable in extents if writable])

    def load(self, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """`[threads, count]`"""
        out = np.empty((len(addresses), count), dtype)
        for here, memory, index in self._reads.find(addresses, dtype, count, "reads"):
            out[here] = memory[index]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: `[threads, count]`"""
        for here, memory, index in self._writes.find(addresses, values.dtype, values.shape[1], "writes"):
            memory[index] = values[here]


class _Regions:
    def __init__(self, extents: list[tuple[int, int]]):
        merged: list[list[int]] = []
        for begin, end in sorted(extents):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        self._begin, self._end = np.array(merged, np.int64).reshape(-1, 2).T.copy()
        # From the 16-byte boundary before, so that every aligned access is an element.
        self._bytes = [_bytes(begin - begin % 16, end + -end % 16) for begin, end in merged]

    def find(self, addresses, dtype, count, does):
        """The threads (a mask, or all) that access a region, the region as elements, and their indices there."""
        size = dtype.itemsize * count
        region = np.searchsorted(self._begin, addresses, "right") - 1
        bad = (region < 0) | (addresses + size > self._end[region]) if len(self._begin) else np.ones(len(region), bool)
        if bad.any():
            where = [hex(address) for address in addresses[bad][:3]]
            raise Fault(f"{does} {size} bytes at {where}, outside of the tensors that it may access so")
        if (addresses % size).any():
            raise Fault(f"{does} {size} bytes at {hex(addresses[addresses % size != 0][0])}: not aligned")
        for i in np.unique(region):
            here = region == i
            base = self._begin[i] - self._begin[i] % 16
            index = (addresses[here] - base) // dtype.itemsize
            yield here, self._bytes[i].view(dtype), index[:, None] + np.arange(count)


def _bytes(begin: int, end: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))


class Shared:
    """Shared memory of all blocks. Each cell remembers the thread that wrote it and what that thread had passed by
    then: barriers of its block and of its warp. A read by another thread must be behind a barrier that came after."""

    def __init__(self, blocks: int, size: int, threads: int):
        """threads: of a block."""
        self.size, self._stride, self._threads = size, size + -size % 16 + 16, threads
        self._bytes = np.zeros(blocks * self._stride, np.uint8)
        cells = len(self._bytes) // CELL
        self._writer = np.zeros(cells, np.int32)
        self._block_time = np.full(cells, _UNWRITTEN, np.int32)
        self._warp_time = np.zeros(cells, np.int32)
        self.block_clock = np.zeros(blocks * threads, np.int32)
        self.warp_clock = np.zeros(blocks * threads, np.int32)
        # Groups of copies that were started: of each, addresses, values, and the threads.
        self._started: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._groups: list[tuple[np.ndarray, list]] = []

    def load(self, threads: np.ndarray, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """`[threads, count]`"""
        at = self._place(threads, addresses, dtype.itemsize * count, "reads")
        self._check_written(threads, at, dtype.itemsize * count)
        return self._bytes.view(dtype)[(at // dtype.itemsize)[:, None] + np.arange(count)]

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: `[threads, count]`"""
        size = values.itemsize * values.shape[1]
        at = self._place(threads, addresses, size, "writes")
        self._put(threads, at, values)

    def copy(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Begins a copy (cp.async) of values `[threads, words]`, which arrive when the threads wait for them."""
        at = self._place(threads, addresses, values.itemsize * values.shape[1], "copies to")
        self._block_time[self._cells(at, values.itemsize * values.shape[1])] = _IN_FLIGHT
        self._started.append((threads, at, values))

    def commit(self, threads: np.ndarray) -> None:
        """Closes the group of copies that these threads started."""
        group, rest = [], []
        committing = np.zeros(len(self.block_clock), bool)
        committing[threads] = True
        for owners, at, values in self._started:
            mine = committing[owners]
            if mine.any():
                group.append((owners[mine], at[mine], values[mine]))
            if not mine.all():
                rest.append((owners[~mine], at[~mine], values[~mine]))
        self._started = rest
        self._groups.append((threads, group))

    def wait(self, threads: np.ndarray, left: int) -> None:
        """All but the newest `left` groups of these threads arrive."""
        newer = np.full(len(self.block_clock), -(2**31), np.int64)
        newer[threads] = 0
        groups = []
        for owners, copies in reversed(self._groups):
            rest = []
            for who, at, values in copies:
                ready = newer[who] >= left
                if ready.any():
                    self._put(who[ready], at[ready], values[ready])
                if not ready.all():
                    rest.append((who[~ready], at[~ready], values[~ready]))
            done = newer[owners] >= left
            newer[owners] += 1
            # A group counts for a thread until the thread has waited for it.
            if not done.all():
                groups.append((owners[~done], rest))
        self._groups = groups[::-1]

    def pending(self) -> int:
        """Copies that nobody waited for."""
        return sum(len(c[0]) for _, copies in self._groups for c in copies) + sum(len(c[0]) for c in self._started)

    def _place(self, threads, addresses, size, does):
        bad = (addresses < 0) | (addresses + size > self.size)
        if bad.any():
            raise Fault(f"{does} {size} bytes at {addresses[bad][0]} of shared memory, which has {self.size}")
        if (addresses % size).any():
            raise Fault(f"{does} {size} bytes at {addresses[addresses % size != 0][0]} of shared memory: not aligned")
        return addresses + threads // self._threads * self._stride

    def _cells(self, at, size):
        return (at // CELL)[:, None] + np.arange(-(-size // CELL))

    def _put(self, threads, at, values):
        self._bytes.view(values.dtype)[(at // values.itemsize)[:, None] + np.arange(values.shape[1])] = values
        cells = self._cells(at, values.itemsize * values.shape[1])
        self._writer[cells] = threads[:, None]
        self._block_time[cells] = self.block_clock[threads][:, None]
        self._warp_time[cells] = self.warp_clock[threads][:, None]

    def _check_written(self, threads, at, size):
        cells = self._cells(at, size)
        times = self._block_time[cells]
        late = times >= self.block_clock[threads][:, None]
        if not late.any():
            return
        reader = np.broadcast_to(threads[:, None], cells.shape)[late]
        cells, times = cells[late], times[late]
        where = cells * CELL % self._stride
        for time, what in ((_UNWRITTEN, "nobody wrote"), (_IN_FLIGHT, "a copy may still be on its way to")):
            if (times == time).any():
                raise Fault(f"reads byte {where[times == time][0]} of shared memory, which {what}")
        writer = self._writer[cells]
        same_warp = (writer // 32 == reader // 32) & (self._warp_time[cells] < self.warp_clock[reader])
        bad = (writer != reader) & ~same_warp
        if bad.any():
            raise Fault(f"reads byte {where[bad][0]} of shared memory: no barrier since another thread's write")
