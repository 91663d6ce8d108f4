"""Pages of waiting requests in the main memory: `cpu_offload_space` of transformers' continuous batching.

When pages run out, transformers' manager takes those of some requests away, copies the blocks to a pool in the main
memory, and copies them back when there is room again. A block moves byte for byte, so quantized pages are a quarter or
half of the traffic, and a request goes on as if it had never left.

The manager pairs old and new blocks by their place in a table. That does not suffice for ours: exact copies are in
blocks of their own, and a sliding layer may need fewer pages afterwards. `_Tables` gives it tables that fit.
"""

from __future__ import annotations

from typing import Any

from .allocators import QuantizedAllocator
from .host import continuous_batching

_HOST = continuous_batching()


class _Tables:
    """Stands for the `block_table` of an allocator: all blocks of a request, in an order that outlasts its absence."""

    def __init__(self, allocator: QuantizedAllocator):
        self._allocator = allocator
        # Which pages of its sequence a request had when its table was last read, and when it left.
        self._read: dict[str, list[int]] = {}
        self.away: dict[str, list[int]] = {}

    def get(self, request_id: str, default: list[int]) -> list[int]:
        """The pages, then the exact blocks, which a request may not have had when it left."""
        pages = self._allocator.numbered_pages(request_id)
        exact = self._allocator.exact_table.get(request_id, default)
        if request_id in self.away:
            # Nobody reads what is written for a page that the window has left.
            unused = self._allocator.trash_block
            return [*(pages.get(number, unused) for number in self.away[request_id]), *exact]
        self._read[request_id] = [*pages]
        return [*pages.values(), *exact]

    def leave(self, request_id: str) -> None:
        """The blocks that were last read have been copied to the main memory."""
        self.away[request_id] = self._read[request_id]


class _AllBlocks:
    """An allocator with `_Tables`."""

    def __init__(self, allocator: QuantizedAllocator):
        self._allocator, self.block_table = allocator, _Tables(allocator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._allocator, name)


class _AsMoved:
    """A paged cache whose allocators are `_AllBlocks`."""

    def __init__(self, cache: Any):
        self._cache = cache
        self.cache_allocators = {kind: _AllBlocks(each) for kind, each in cache.cache_allocators.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class OffloadingManager(_HOST.OffloadingManager):  # type: ignore[name-defined]
    """transformers' offloading manager for quantized pages.

    moved: how many times a request has left, and come back.
    """

    def __init__(self, cache: Any, **kwargs: Any) -> None:
        self.moved = {"left": 0, "returned": 0}
        super().__init__(cache=_AsMoved(cache), **kwargs)

    def _tables(self) -> list[_Tables]:
        return [allocator.block_table for allocator in self.cache.cache_allocators.values()]

    def _offload_to_cpu(self, victims: list, victim_block_tables: dict) -> set[str]:
        left = super()._offload_to_cpu(victims, victim_block_tables)
        for request_id in left:
            for tables in self._tables():
                tables.leave(request_id)
        self.moved["left"] += len(left)
        return left

    def restore_scheduled_requests(self, requests_in_batch: list) -> None:
        returning = [future.state.request_id for future in requests_in_batch if future.state.is_cpu_offloaded]
        super().restore_scheduled_requests(requests_in_batch)
        self._forget(returning)
        self.moved["returned"] += len(returning)

    def free_request_cpu_cache(self, state: Any) -> None:
        super().free_request_cpu_cache(state)
        self._forget([state.request_id])

    def _forget(self, request_ids: list[str]) -> None:
        for tables in self._tables():
            for request_id in request_ids:
                tables.away.pop(request_id, None)


def offloading_manager(cache: Any, **kwargs: Any) -> Any:
    """The offloading manager of a paged cache: transformers' own for dense pages."""
    is_ours = any(isinstance(allocator, QuantizedAllocator) for allocator in cache.cache_allocators.values())
    return (OffloadingManager if is_ours else _HOST.OffloadingManager)(cache=cache, **kwargs)
