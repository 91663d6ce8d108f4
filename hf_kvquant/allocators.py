"""Allocators for transformers' continuous batching: which blocks of quantized pages a request has, and what its tokens
attend to.

transformers' manager keeps one flat tensor. Its cache divides the tensor into blocks (a page for each layer of one
kind), hands them to requests, shares, copies and frees them. An allocator says how many bytes a page has and what is
in it (`pages`); everything else that the manager does with blocks is its own code. A request that needs exact copies
holds `exact_blocks` blocks more. They come from the same tensor, so the budget in bytes means what it means for the
dense cache.

Full-attention layers keep every page. Sliding layers keep those that the next query sees, and give the others back, a
page at a time:

            given back     |  columns 0 .. length of the table
    -----------------------+-------------+--------------------------+
                           | hidden      | seen by the next query   |

As in `sliding`, every rule about columns is about differences, and a page is whole blocks. So a query reads what it
would read if all pages had stayed. Sliding layers that the config does not quantize have dense pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NoReturn

import torch

from . import ops
from .config import KVQuantConfig
from .host import context_length, continuous_batching
from .pages import ALIGNMENT, LayerPages, PagedLayer, page_table
from .states import PageTable, hides_columns

_HOST = continuous_batching()
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Chunk:
    """New tokens of one request in a batch: `n` of them from `offset` on, behind `past` that are stored."""

    request_id: str
    past: int
    n: int
    offset: int = 0


class Rows:
    """Requests of a batch whose new tokens attend in one call. A step makes the tensors below once, for all layers.

    `at` finds their new tokens in the batch: a slice if they lie one after the other, else an index per request.
    """

    def __init__(self, chunks: Sequence[Chunk], allocator: QuantizedAllocator):
        self.chunks, self._allocator = chunks, allocator
        self._made: dict[tuple, Any] = {}
        offsets = [at for chunk in chunks for at in range(chunk.offset, chunk.offset + chunk.n)]
        follow = offsets == list(range(offsets[0], offsets[0] + len(offsets)))
        self.at: Any = slice(offsets[0], offsets[-1] + 1) if follow else torch.tensor(offsets, device=allocator.device)
        # New tokens of a single request that its later queries do not see, and that are not stored.
        self.unseen = allocator.unseen(chunks[0]) if len(chunks) == 1 else 0

    def _once(self, key: tuple, make: Callable) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def before(self, exact_block: int) -> PageTable:
        """The pages of what is stored before the new tokens."""
        return self._once(("before", exact_block), lambda: self._table(exact_block))

    def place(self, exact_block: int) -> PageTable:
        """The pages behind whose columns the new tokens go, `unseen` ones aside."""
        if not self.unseen:
            return self.before(exact_block)
        return self._once(("place", exact_block), lambda: self._table(exact_block, self.unseen))

    def _table(self, exact_block: int, skip: int = 0) -> PageTable:
        return self._placed(self._allocator.table(self.chunks, exact_block, skip))

    def _placed(self, table: PageTable) -> PageTable:
        """The table with its tensors on the device of the pages, too; tables that share a tensor share its copy."""
        device = self._allocator.device
        if device.type == "cpu":
            return table

        def there(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else self._once(("copy", x), lambda: x.to(device))

        return table._replace(on_device=PageTable._make((*map(there, table[:5]), None)))

    def after(self, exact_block: int) -> PageTable:
        """The pages with the new tokens in them, as the query of each request's last one sees them."""

        def make() -> PageTable:
            before = self.before(exact_block)
            new = torch.tensor([chunk.n for chunk in self.chunks])
            after = self._allocator.seen(before._replace(lengths=before.lengths + new))
            return self._placed(after)

        return self._once(("after", exact_block), make)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What the new tokens of a single request see: its past in the cache, and themselves up to each; a term to add
        to scores, `[1, 1, n, past + n]`."""

        def make() -> torch.Tensor:
            (chunk,) = self.chunks
            first = self._allocator.first_column(chunk.request_id) if chunk.past else 0
            column = torch.arange(first, chunk.past + chunk.n, device=self._allocator.device)
            query = column[len(column) - chunk.n :, None]
            hidden = column > query
            if self._allocator.window is not None:
                hidden |= column <= query - self._allocator.window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]

        return self._once(("mask", dtype), make)

    def hides_columns(self) -> bool:
        """Whether the window hides new tokens of a single request from each other."""
        return hides_columns(self._allocator.window, self.chunks[0].n)


class Batch:
    """The requests of one forward call, by the way in which their new tokens attend.

    first, long: requests without, and with, tokens in the cache, each by itself.
    short: requests with a few new tokens, token by token: those that have a first one, a second one, and so on.
    """

    def __init__(self, chunks: Sequence[Chunk], allocator: QuantizedAllocator):
        # The scheduler may give a request no tokens, when others take all that a batch may have.
        chunks = [chunk for chunk in chunks if chunk.n]
        more = [chunk for chunk in chunks if chunk.past]
        few = [chunk for chunk in more if is_short(chunk.past, chunk.n)]
        self.first = [Rows([chunk], allocator) for chunk in chunks if chunk.past == 0]
        self.long = [Rows([chunk], allocator) for chunk in more if not is_short(chunk.past, chunk.n)]
        self.short = [
            Rows(
                [Chunk(x.request_id, x.past + step, 1, x.offset + step) for x in few if x.n > step],
                allocator,
            )
            for step in range(max((chunk.n for chunk in few), default=0))
        ]  # fmt: skip


def is_short(past: int, n: int) -> bool:
    """Whether new tokens are stored one by one, each before it attends."""
    return past > 0 and n <= ops.MAX_Q_LEN


def window_of(config: Any) -> int | None:
    """The window of a model's sliding layers; None if it hides nothing."""
    window = getattr(config, "sliding_window", None)
    return window if hides_columns(window, context_length(config)) else None


def layouts_of(
    kv_config: KVQuantConfig, config: Any, num_kv_heads: int, dtype: torch.dtype, page_size: int
) -> dict[str, list[LayerPages]]:
    """The layouts of all layers, by kind.

    Raises:
        ValueError: a layer cannot be stored in pages, or none of them is quantized.
    """
    layouts, groups = {}, _HOST.group_layers(config)
    for kind, layers in groups.items():
        window = window_of(config) if kind == SLIDING else None
        layouts[kind] = [
            LayerPages.of(
                kv_config if kv_config.quantizes(layer, window) else kv_config.with_dense(layer), layer, num_kv_heads,
                _HOST.find_head_dim(config), dtype, page_size,
            )
            for layer in layers
        ]  # fmt: skip
    if set(layouts) == {SLIDING} and all(s.is_dense for layout in layouts[SLIDING] for s in layout.specs):
        raise ValueError(
            f"{config.model_type}: all layers have a window of {config.sliding_window} tokens, which `sliding: "
            f"{kv_config.sliding}` does not quantize: nothing to quantize"
        )
    return layouts


# The most blocks of the larger kind in a sector, the unit that kinds of layers take of the memory.
_MOST_BLOCKS = 16
# The share of a page that may be padding if sectors are smaller for it.
_PADDING = 0.1


def page_bytes(layouts: dict[str, list[LayerPages]]) -> dict[str, int]:
    """The bytes of a page of each kind of layers.

    With two kinds pages are a little larger than their content. A sector is the least common multiple of their blocks,
    and of blocks of arbitrary sizes it would be huge.
    """
    content = {kind: max(layout.page_bytes for layout in each) for kind, each in layouts.items()}
    if len(content) == 1:
        return content
    layers = {kind: len(each) for kind, each in layouts.items()}
    small, large = sorted(content, key=lambda kind: content[kind] * layers[kind])
    ratio = content[large] * layers[large] / (content[small] * layers[small])

    def padded(a: int, b: int) -> dict[str, int]:
        """The smallest pages of which `a` small blocks are as long as `b` large ones."""
        common = gcd(a * layers[small], b * layers[large])
        unit = {large: a * layers[small] // common * ALIGNMENT, small: b * layers[large] // common * ALIGNMENT}
        times = max(-(-content[kind] // unit[kind]) for kind in unit)
        return {kind: times * unit[kind] for kind in unit}

    def padding(pages: dict[str, int]) -> float:
        return sum(pages[kind] / content[kind] - 1 for kind in pages)

    counts = range(1, _MOST_BLOCKS + 1)
    found = [padded(a, b) for b in counts for a in {int(b * ratio), int(b * ratio) + 1}]
    least = min(map(padding, found))
    # Those with the fewest large blocks come first.
    return next(pages for pages in found if padding(pages) <= least + _PADDING)


class QuantizedAllocator(_HOST.FullAttentionCacheAllocator):  # type: ignore[name-defined]
    """Hands out blocks of quantized pages to requests, and blocks for their exact copies."""

    supports_block_table = False
    # The config's window, and the same if it is narrow enough to hide a column.
    sliding_window: int | None = None
    window: int | None = None

    def __init__(
        self,
        kv_config: KVQuantConfig,
        *,
        index: int,
        config: Any,
        num_key_value_heads: int,
        cache_dtype: torch.dtype,
        page_size: int,
        layer_indices: list[int],
        allow_block_sharing: bool,
    ) -> None:
        self.head_dim = _HOST.find_head_dim(config)
        self.num_key_value_heads, self.cache_dtype, self.kv_config = num_key_value_heads, cache_dtype, kv_config
        layouts = layouts_of(kv_config, config, num_key_value_heads, cache_dtype, page_size)
        self.layouts = layouts[self.layer_type]
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=page_size,
            bytes_per_page=page_bytes(layouts)[self.layer_type],
            allow_block_sharing=allow_block_sharing,
        )
        self.exact_bytes = max(layout.exact_bytes for layout in self.layouts)
        self.layers_per_exact_block, self.exact_blocks = len(layer_indices), 0
        if self.exact_bytes:
            self.layers_per_exact_block = self.bytes_per_block // self.exact_bytes
            if not self.layers_per_exact_block:
                least = -(-page_size * self.exact_bytes // self.bytes_per_block)
                raise ValueError(
                    f"page_size: {page_size} is not allowed: the exact tokens of a request take {self.exact_bytes} "
                    f"bytes per layer, a block of {len(layer_indices)} pages {self.bytes_per_block}; expected about "
                    f"{least}"
                )
            self.exact_blocks = -(-len(layer_indices) // self.layers_per_exact_block)
        # Exact copies of a prefix belong to the request that computed it, unless they end with its last page.
        self.shares_prefixes = not (kv_config.sink_length or kv_config.recent_length)
        self.exact_table: dict[str, list[int]] = {}
        self._scheduled: list[Chunk] = []
        self._batch: Batch | None = None

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: Any
    ) -> None:
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        self.faults = torch.zeros(2, dtype=torch.int64, device=cache_tensor.device)
        self.layers = {
            layer_idx: PagedLayer(
                layout, self.kv_config, cache_tensor, i * self.bytes_per_page,
                i % self.layers_per_exact_block * self.exact_bytes, self.bytes_per_block, self.tokens_per_page,
            )
            for i, (layer_idx, layout) in enumerate(zip(self.layer_indices, self.layouts))
        }  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self._copy_view.device

    @property
    def trash_block(self) -> int:
        """A block that nobody reads."""
        return self.blocks_per_sector

    def exact_block(self, layer_idx: int) -> int:
        """Which of a request's exact blocks holds the exact copies of a layer."""
        return self.layer_indices.index(layer_idx) // self.layers_per_exact_block

    # --- blocks: as transformers counts them, and the exact ones

    def _missing_exact_blocks(self, request_id: str) -> int:
        return self.exact_blocks - len(self.exact_table.get(request_id, ()))

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        needed = super().needs_new_blocks(request_id, past_length, query_length)
        return needed + self._missing_exact_blocks(request_id)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        if self._missing_exact_blocks(request_id):
            self.exact_table[request_id] = self.pool.get_free_blocks(self.index, self.exact_blocks)
        self._allocate_pages(request_id, past_length, query_length)

    def _allocate_pages(self, request_id: str, past_length: int, query_length: int) -> None:
        super().allocate_cache_to_request(request_id, past_length, query_length)

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        self.pool.free_blocks(self.index, self.exact_table.pop(request_id, []))
        super().free_blocks(request_id, no_cache)

    def count_non_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return super().count_non_shareable_blocks(source_request_id, past_length) + self.exact_blocks

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        source, copies = super().fork_blocks(source_request_id, dest_request_id, past_length)
        if self.exact_blocks:
            exact = self.exact_table[dest_request_id] = self.pool.get_free_blocks(self.index, self.exact_blocks)
            # A request that has shared pages only, and computed nothing yet, has no exact copies.
            held = self.exact_table.get(source_request_id, [])
            source, copies = [*source, *held], [*copies, *exact[: len(held)]]
        return source, copies

    # --- batches: the manager asks for indices of every request in a batch, then it calls the model

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return past_length + query_length

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return []

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Notes the request for `batch`; the indices are not used."""
        if self._batch is not None:
            self._batch, self._scheduled = None, []
        self._scheduled.append(Chunk(request_id, past_length, query_length))
        return [self.write_trash_index] * query_length

    def batch(self, q_ends: torch.Tensor, k_ends: torch.Tensor) -> Batch:
        """The batch of the running forward call.

        Args:
            q_ends, k_ends: where the new tokens, and all tokens, of each request begin and end, `[requests + 1]`.

        Raises:
            RuntimeError: these are not the requests that were scheduled last.
        """
        if self._batch is None:
            chunks, offset = [], 0
            for chunk in self._scheduled[1 - len(q_ends) :]:
                chunks.append(Chunk(chunk.request_id, chunk.past, chunk.n, offset))
                offset += chunk.n
            asked = list(zip(q_ends.diff().tolist(), k_ends.diff().tolist()))
            if asked != [(chunk.n, chunk.past + chunk.n) for chunk in chunks]:
                raise RuntimeError(f"continuous batching runs (new, all) tokens {asked}, but scheduled {chunks}")
            self._batch = Batch(chunks, self)
        return self._batch

    def pages_of(self, request_id: str, first: int) -> list[int]:
        """The blocks of a request from page `first` of its sequence on."""
        return self.block_table[request_id][first:]

    def numbered_pages(self, request_id: str) -> dict[int, int]:
        """The blocks of a request by which page of its sequence they are."""
        return dict(enumerate(self.block_table.get(request_id, [])))

    def first_column(self, request_id: str) -> int:
        """The position of the first column in a request's tables: what came before has been given back."""
        return 0

    def unseen(self, chunk: Chunk) -> int:
        """How many of the new tokens no later query sees, whose pages the request does not have."""
        return 0

    def table(self, chunks: Sequence[Chunk], exact_block: int, skip: int = 0) -> PageTable:
        """The pages of some requests, with the columns that they have before their new tokens; the first `skip` of
        those come without being stored."""
        exact = None
        if self.exact_blocks:
            exact = [self.exact_table[chunk.request_id][exact_block] for chunk in chunks]
        size, used, lengths, dropped = self.tokens_per_page, [], [], []
        for chunk in chunks:
            begin = chunk.past + skip
            first = begin // size if skip else self.first_column(chunk.request_id) // size
            end = -(-(chunk.past + chunk.n) // size)
            used.append(self.pages_of(chunk.request_id, first)[: end - first])
            lengths.append(begin - first * size)
            dropped.append(first * size)
        return page_table(used, exact, lengths, self._copy_view.shape[0], dropped if any(dropped) else None)

    def seen(self, table: PageTable) -> PageTable:
        """The table for queries at the last columns of its rows: with what a window hides from them."""
        if self.window is None or int(table.lengths.max()) <= self.window:
            return table
        columns = torch.arange(table.pages.shape[1] * self.tokens_per_page)
        return table._replace(seen=columns >= (table.lengths - self.window)[:, None])

    def update(self, *args: Any) -> NoReturn:
        raise AssertionError("QuantizedPagedCache.update does not call this")


class SlidingAllocator(QuantizedAllocator):
    """The same for sliding layers: a request gives pages back that its window has left."""

    layer_type = SLIDING
    supports_block_sharing = False

    def __init__(self, kv_config: KVQuantConfig, *, config: Any, **kwargs: Any) -> None:
        self.sliding_window, self.window = config.sliding_window, window_of(config)
        # Which page of its sequence each block of a request is.
        self.numbers: dict[str, list[int]] = {}
        if self.window is not None and kv_config.sink_length >= self.window:
            raise ValueError(
                f"sink_length: {kv_config.sink_length} is not allowed with a window of {self.window} tokens in "
                f"continuous batching; expected less"
            )
        super().__init__(kv_config, config=config, **kwargs)

    def _first_page(self, length: int) -> int:
        """The first page that a query behind `length` tokens sees, or the query before it: the manager asks for the
        whole prompt of a request with copies, and then leaves its last token to the copies."""
        return 0 if self.window is None else max(0, length - self.window) // self.tokens_per_page

    def _needed(self, past: int, n: int) -> list[int]:
        """The pages that hold what new tokens see, and what is stored of them."""
        old = range(self._first_page(past), -(-past // self.tokens_per_page))
        begin = past if is_short(past, n) else past + n
        new = range(self._first_page(begin), -(-(past + n) // self.tokens_per_page))
        return sorted({*old, *new})

    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        # Those that are not needed any more are used again.
        return max(0, len(self._needed(past_length, query_length)) - allocated_blocks)

    def _allocate_pages(self, request_id: str, past_length: int, query_length: int) -> None:
        needed = self._needed(past_length, query_length)
        held = self.numbered_pages(request_id)
        free = [held.pop(number) for number in list(held) if number not in needed]
        missing = [number for number in needed if number not in held]
        free += self.pool.get_free_blocks(self.index, max(0, len(missing) - len(free)))
        held |= {number: free.pop() for number in missing}
        self.pool.free_blocks(self.index, free)
        self.numbers[request_id] = needed
        self.block_table[request_id] = [held[number] for number in needed]

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        super().free_blocks(request_id, no_cache)
        self.numbers.pop(request_id, None)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        self.numbers[dest_request_id] = self.numbers[source_request_id]
        return super().fork_blocks(source_request_id, dest_request_id, past_length)

    def pages_of(self, request_id: str, first: int) -> list[int]:
        return self.block_table[request_id][self.numbers[request_id].index(first) :]

    def numbered_pages(self, request_id: str) -> dict[int, int]:
        return dict(zip(self.numbers.get(request_id, []), self.block_table.get(request_id, [])))

    def first_column(self, request_id: str) -> int:
        return self.numbers[request_id][0] * self.tokens_per_page

    def unseen(self, chunk: Chunk) -> int:
        if is_short(chunk.past, chunk.n):
            return 0
        return max(0, self._first_page(chunk.past + chunk.n) * self.tokens_per_page - chunk.past)


ALLOCATORS: dict[str, type[QuantizedAllocator]] = {FULL: QuantizedAllocator, SLIDING: SlidingAllocator}
