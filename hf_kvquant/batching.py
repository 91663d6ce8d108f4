"""Quantized pages in transformers' continuous batching: the allocator of pages, the cache, and the attention route.

transformers' manager keeps one flat tensor. Its cache divides the tensor into blocks (a page per layer), hands them to
requests, shares, copies and frees them. `QuantizedAllocator` says how many bytes a page has and what is in it
(`pages`); everything else that the manager does with blocks is its own code. A request that needs exact copies holds
`exact_blocks` blocks more. They come from the same tensor, so the budget in bytes means what it means for the dense
cache.

`QuantizedPagedCache.update` returns `NewStates`, which make attention store the new tokens and read the pages:

    the first tokens of a request          exact attention among themselves, then stored
    at most `ops.MAX_Q_LEN` more tokens    each is stored, and reads the pages as they are, all requests in one call
    a longer chunk                         reads its de-quantized past and itself, then it is stored

This is what a `QuantizedCache` does with one request (`layers`), so a request reads the same alone and in a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import torch

from . import ops
from .config import KVQuantConfig
from .host import attn_implementation, continuous_batching
from .pages import LayerPages, PagedLayer, page_table
from .route import Routes, say_once
from .states import PageTable

_HOST = continuous_batching()

# Arguments of the manager's forward calls, which the cache and this file use up.
_OF_BATCHES = frozenset({
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "logits_indices", "logits_processor_args", "is_causal", "use_cache", "cache",
})  # fmt: skip
_NOT_SERVED = "not served in continuous batching with quantized pages"
_HARMLESS = frozenset({"dropout", "scaling", "sliding_window", "position_ids", "logits_to_keep"})


@dataclass(frozen=True)
class _Chunk:
    """New tokens of one request in a batch: `n` of them from `offset` on, behind `past` that are stored."""

    request_id: str
    past: int
    n: int
    offset: int = 0


class Rows:
    """Requests of a batch whose new tokens attend in one call. What a step needs of them is made once, for all layers.

    `at` finds their new tokens in the batch: a slice if they lie one after the other, else an index per request.
    """

    def __init__(self, chunks: Sequence[_Chunk], allocator: QuantizedAllocator):
        self.chunks, self._allocator = chunks, allocator
        self._tables: dict[int, tuple[PageTable, PageTable]] = {}
        offsets = [at for chunk in chunks for at in range(chunk.offset, chunk.offset + chunk.n)]
        follow = offsets == list(range(offsets[0], offsets[0] + len(offsets)))
        self.at: Any = slice(offsets[0], offsets[-1] + 1) if follow else torch.tensor(offsets)

    def tables(self, exact_block: int) -> tuple[PageTable, PageTable]:
        """The pages of the requests, with the lengths before and after their new tokens."""
        if exact_block not in self._tables:
            before = self._allocator.table(self.chunks, exact_block)
            new = torch.tensor([chunk.n for chunk in self.chunks])
            self._tables[exact_block] = before, before._replace(lengths=before.lengths + new)
        return self._tables[exact_block]

    @cached_property
    def mask(self) -> torch.Tensor:
        """What the new tokens of a single request see: its past, and themselves up to each; `[1, 1, n, past + n]`."""
        (chunk,) = self.chunks
        column = torch.arange(chunk.past + chunk.n)
        return (column <= column[chunk.past :, None])[None, None]


class Batch:
    """The requests of one forward call, by the way in which their new tokens attend.

    first, long: requests without, and with, tokens in the cache, each by itself.
    short: requests with a few new tokens, token by token: those that have a first one, a second one, and so on.
    """

    def __init__(self, chunks: Sequence[_Chunk], allocator: QuantizedAllocator):
        # The scheduler may give a request no tokens, when others take all that a batch may have.
        chunks = [chunk for chunk in chunks if chunk.n]
        more = [chunk for chunk in chunks if chunk.past]
        few = [chunk for chunk in more if chunk.n <= ops.MAX_Q_LEN]
        self.first = [Rows([chunk], allocator) for chunk in chunks if chunk.past == 0]
        self.long = [Rows([chunk], allocator) for chunk in more if chunk.n > ops.MAX_Q_LEN]
        self.short = [
            Rows(
                [_Chunk(x.request_id, x.past + step, 1, x.offset + step) for x in few if x.n > step],
                allocator,
            )
            for step in range(max((chunk.n for chunk in few), default=0))
        ]  # fmt: skip


class QuantizedAllocator(_HOST.FullAttentionCacheAllocator):  # type: ignore[name-defined]
    """Hands out blocks of quantized pages to requests, and blocks for their exact copies."""

    supports_block_table = False

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
        self.layouts = [
            LayerPages.of(kv_config, layer, num_key_value_heads, self.head_dim, cache_dtype, page_size)
            for layer in layer_indices
        ]
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=page_size,
            bytes_per_page=max(layout.page_bytes for layout in self.layouts),
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
        self._scheduled: list[_Chunk] = []
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

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return []

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Notes the request for `batch`; the indices are not used."""
        if self._batch is not None:
            self._batch, self._scheduled = None, []
        self._scheduled.append(_Chunk(request_id, past_length, query_length))
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
                chunks.append(_Chunk(chunk.request_id, chunk.past, chunk.n, offset))
                offset += chunk.n
            asked = list(zip(q_ends.diff().tolist(), k_ends.diff().tolist()))
            if asked != [(chunk.n, chunk.past + chunk.n) for chunk in chunks]:
                raise RuntimeError(f"continuous batching runs (new, all) tokens {asked}, but scheduled {chunks}")
            self._batch = Batch(chunks, self)
        return self._batch

    def table(self, chunks: Sequence[_Chunk], exact_block: int) -> PageTable:
        exact = None
        if self.exact_blocks:
            exact = [self.exact_table[chunk.request_id][exact_block] for chunk in chunks]
        used = [
            self.block_table[chunk.request_id][: -(-(chunk.past + chunk.n) // self.tokens_per_page)]
            for chunk in chunks
        ]  # fmt: skip
        return page_table(used, exact, [chunk.past for chunk in chunks], self._copy_view.shape[0])

    def update(self, *args: Any) -> NoReturn:
        raise AssertionError("QuantizedPagedCache.update does not call this")


class _MemoryHandler(_HOST.PagedAttentionMemoryHandler):  # type: ignore[name-defined]
    """Counts no attention masks: the operator needs none, and the manager makes none for our attention."""

    def attention_mask_bytes(self, max_batch_tokens: int, num_sectors: int) -> int:
        return 0


class QuantizedPagedCache(_HOST.PagedAttentionCache):  # type: ignore[name-defined]
    """transformers' paged cache with quantized pages.

    `routes` counts calls of attention, as in `QuantizedCache`; `tokens_held` is what fits.
    """

    use_prefix_sharing: bool

    def __init__(self, kv_config: KVQuantConfig, **kwargs: Any) -> None:
        self.kv_config, self.routes = kv_config, Routes()
        super().__init__(**kwargs)
        self.allocator: QuantizedAllocator = self.cache_allocators["full_attention"]
        self.use_prefix_sharing = self.use_prefix_sharing and self.allocator.shares_prefixes

    @property
    def tokens_held(self) -> int:
        """The tokens that all requests together can hold, exact copies aside."""
        return self.allocator.num_blocks * self.allocator.tokens_per_page

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[NewStates, NewStates]:
        """Keys and values `[1, num_kv_heads, tokens, head_dim]` of the new tokens of all requests, for `attend`."""
        allocator = self.allocator
        expected = (1, allocator.num_key_value_heads, key_states.shape[2], allocator.head_dim)
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if tuple(states.shape) != expected or states.dtype != self.dtype:
                raise ValueError(
                    f"{name}: {tuple(states.shape)} of {states.dtype} cannot be stored in the pages of layer "
                    f"{layer_idx}; expected {expected} of {self.dtype}"
                )
        batch = allocator.batch(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][allocator.layer_type])
        update = _Update(allocator, batch, layer_idx, self.routes)
        return NewStates(key_states, update), NewStates(value_states, update)


class _Update:
    """One layer's part of a forward call; its tokens are stored once."""

    def __init__(self, allocator: QuantizedAllocator, batch: Batch, layer_idx: int, routes: Routes):
        self.allocator, self.batch, self.layer_idx, self.routes = allocator, batch, layer_idx, routes
        self.layer = allocator.layers[layer_idx]
        self.is_stored = False

    def tables(self, rows: Rows) -> tuple[PageTable, PageTable]:
        return rows.tables(self.allocator.exact_block(self.layer_idx))

    def append(self, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> None:
        self.layer.append(key, value, self.tables(rows)[0], self.allocator.faults)
        if self.allocator.faults[0]:
            say_once("A NaN or infinity reached the quantized KV cache of a batch.")


@dataclass(frozen=True, eq=False)
class NewStates:
    """Keys or values that `QuantizedPagedCache.update` returns. Attention stores them and reads the pages."""

    new: torch.Tensor
    update: _Update

    shape = property(lambda self: self.new.shape)
    dtype = property(lambda self: self.new.dtype)
    device = property(lambda self: self.new.device)
    ndim = property(lambda self: self.new.ndim)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        raise TypeError(_changed(getattr(func, "__name__", func)))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_changed(name))

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError(_changed("indexing"))


def _changed(what: object) -> str:
    return (
        f"{what} was called on keys or values of a quantized paged cache: this model changes cached states before "
        "attention, and continuous batching serves it with a dense cache only"
    )


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    *,
    dense_attention: Callable,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of all requests in a batch, with the signature of transformers' attention functions.

    Args:
        query: `[1, num_heads, tokens, head_dim]`, the new tokens of one request after the other.
        key, value: `NewStates` of the same tokens.

    Returns:
        `[1, tokens, num_heads, head_dim]`, and None.

    Raises:
        ValueError: an argument that the operator does not know, or states of another cache.
    """
    cache = kwargs.get("cache")
    if isinstance(cache, QuantizedPagedCache):
        # Before transformers 5.24 attention functions update the cache.
        layer_idx: Any = module.layer_idx
        key, value = cache.update(key, value, layer_idx, kwargs)
    if not (isinstance(key, NewStates) and isinstance(value, NewStates) and key.update is value.update):
        raise ValueError(
            f"{type(module).__name__} attends to {type(key).__name__} and {type(value).__name__} in continuous "
            "batching with a quantized cache; expected the return values of cache.update"
        )
    unknown = [name for name, x in kwargs.items() if x is not None and name not in _OF_BATCHES | _HARMLESS]
    unknown += ["dropout"] * bool(kwargs.get("dropout")) + ["sliding_window"] * bool(kwargs.get("sliding_window"))
    unknown += ["attention_mask"] * (attention_mask is not None)
    if unknown:
        raise ValueError(f"attention argument {unknown[0]!r}: {_NOT_SERVED}")
    update, keys, values = key.update, key.new, value.new
    if update.is_stored:
        raise ValueError(f"layer {update.layer_idx} attends twice to the same states: {_NOT_SERVED}")
    update.is_stored = True
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    dense_kwargs = {name: x for name, x in kwargs.items() if name not in _OF_BATCHES}
    output = query.new_empty(1, query.shape[2], query.shape[1], values.shape[-1])

    for each, has_past in ((update.batch.first, False), (update.batch.long, True)):
        for rows in each:
            q, k, v = (x[:, :, rows.at] for x in (query, keys, values))
            new, mask = (k, v), None
            if has_past:
                past = update.layer.past(update.tables(rows)[0], 0)
                k, v = (torch.cat(x, dim=2) for x in zip(past, new))
                mask = rows.mask
            update.routes.count("decode_dequantized" if has_past else "prefill_dense")
            output[:, rows.at] = dense_attention(module, q, k, v, mask, **dense_kwargs)[0]
            update.append(*new, rows)
    for rows in update.batch.short:
        # [1, heads, tokens, head_dim] -> [requests, heads, 1, head_dim]
        q, k, v = (x[0, :, rows.at].transpose(0, 1)[:, :, None] for x in (query, keys, values))
        update.append(k, v, rows)
        states = update.layer.states(update.tables(rows)[1])
        update.routes.count("decode_fused")
        output[0, rows.at] = ops.paged_attention(q, *states, scaling=float(scaling))[0][:, :, 0]
    return output, None


_lock = threading.Lock()


def paged_cache(kv_config: KVQuantConfig | None, **kwargs: Any) -> Any:
    """The paged cache of a manager: quantized, or transformers' own if `kv_config` is None.

    transformers looks its allocators up in a table of the module; no other cache is made while it holds ours.
    """
    with _lock:
        if kv_config is None:
            return _HOST.PagedAttentionCache(**kwargs)
        allocator: Any = partial(QuantizedAllocator, kv_config)
        allocator.supports_block_table = QuantizedAllocator.supports_block_table
        with _HOST.replaced(allocator, _MemoryHandler):
            return QuantizedPagedCache(kv_config, **kwargs)


def refuse_unserved(model: Any, kv_config: KVQuantConfig, options: Any) -> None:
    """Check that quantized pages serve this model and these options of a `ContinuousBatchingConfig`.

    Raises:
        ValueError: they do not; what stands in the way is named.
    """
    text_config = model.config.get_text_config()
    layers = _HOST.group_layers(text_config)
    graphs = options.use_cuda_graph if isinstance(options.use_cuda_graph, tuple) else (options.use_cuda_graph,)
    obstacles = {
        "static": kv_config.static and "a static cache",
        "layer_types": set(layers) != {"full_attention"} and sorted(layers),
        "device": model.device.type != "cpu" and model.device.type,
        "attn_implementation": attn_implementation(text_config) != "sdpa" and attn_implementation(text_config),
        "use_async_batching": options.use_async_batching,
        "cpu_offload_space": options.cpu_offload_space,
        "use_cuda_graph": any(graphs),
        "varlen_compile_config": options.varlen_compile_config,
        "decode_compile_config": options.decode_compile_config,
        "default_compile_level": options.default_compile_level,
    }
    for name, found in obstacles.items():
        if found:
            raise ValueError(f"{name}: {found} is {_NOT_SERVED}; expected {_SERVED.get(name, 'none')}")
    # The manager makes its own later, when the first request comes.
    QuantizedAllocator(
        kv_config, index=0, config=text_config, num_key_value_heads=_HOST.find_num_key_value_heads(text_config),
        cache_dtype=model.dtype, page_size=options.page_size, layer_indices=layers["full_attention"],
        allow_block_sharing=options.allow_block_sharing,
    )  # fmt: skip


_SERVED = {"device": "'cpu'", "attn_implementation": "'sdpa'", "layer_types": "['full_attention']"}
