"""Quantized pages in transformers' continuous batching: the cache and the attention route.

`allocators` says what is in the blocks that transformers' cache hands to requests. `QuantizedPagedCache.update`
returns `NewStates`, which make attention store the new tokens and read the pages:

    the first tokens of a request          exact attention among themselves, then stored
    at most `ops.MAX_Q_LEN` more tokens    each is stored, and reads the pages as they are, all requests in one call
    a longer chunk                         reads its de-quantized past and itself, then it is stored

This is what a `QuantizedCache` does with one request (`layers`, `sliding`), so a request reads the same alone and in a
batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from . import ops
from .allocators import ALLOCATORS, Batch, QuantizedAllocator, Rows
from .config import ALL, KVQuantConfig
from .feedback import check_layers
from .host import attn_implementation, continuous_batching
from .route import Routes, say_once

_HOST = continuous_batching()

# Arguments of the manager's forward calls, which the cache and this file use up.
_OF_BATCHES = frozenset({
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "logits_indices", "logits_processor_args", "is_causal", "use_cache", "cache",
})  # fmt: skip
_NOT_SERVED = "not served in continuous batching with quantized pages"
_HARMLESS = frozenset({
    "dropout", "scaling", "sliding_window", "softcap", "s_aux", "position_ids", "logits_to_keep",
    "output_router_logits",
})  # fmt: skip


class _MemoryHandler(_HOST.PagedAttentionMemoryHandler):  # type: ignore[name-defined]
    """Counts no attention masks: the operator needs none, and the manager makes none for our attention."""

    def attention_mask_bytes(self, max_batch_tokens: int, num_sectors: int) -> int:
        return 0


class QuantizedPagedCache(_HOST.PagedAttentionCache):  # type: ignore[name-defined]
    """transformers' paged cache with quantized pages.

    `routes` counts calls of attention, as in `QuantizedCache`.
    """

    use_prefix_sharing: bool
    cache_allocators: dict[str, QuantizedAllocator]
    layer_to_allocator: dict[int, QuantizedAllocator]

    def __init__(self, kv_config: KVQuantConfig, **kwargs: Any) -> None:
        self.kv_config, self.routes = kv_config, Routes()
        super().__init__(**kwargs)
        shares = all(allocator.shares_prefixes for allocator in self.cache_allocators.values())
        self.use_prefix_sharing = self.use_prefix_sharing and shares

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[NewStates, NewStates]:
        """Keys and values `[1, num_kv_heads, tokens, head_dim]` of the new tokens of all requests, for `attend`."""
        allocator = self.layer_to_allocator[layer_idx]
        expected = (1, allocator.num_key_value_heads, key_states.shape[2], allocator.head_dim)
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if tuple(states.shape) != expected or states.dtype != self.dtype:
                raise ValueError(
                    f"{name}: {tuple(states.shape)} of {states.dtype} cannot be stored in the pages of layer "
                    f"{layer_idx}; expected {expected} of {self.dtype}"
                )
        if layer_idx == allocator.layer_indices[0] and allocator.device.type != "cpu":
            # The faults of the previous forward call, so that nothing waits for a GPU in between.
            _tell_faults(allocator)
        batch = allocator.batch(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][allocator.layer_type])
        update = _Update(allocator, batch, layer_idx, self.routes)
        return NewStates(key_states, update), NewStates(value_states, update)


def _tell_faults(allocator: QuantizedAllocator) -> None:
    if allocator.faults[0]:
        say_once("A NaN or infinity reached the quantized KV cache of a batch.")


class _Update:
    """One layer's part of a forward call; its tokens are stored once."""

    def __init__(self, allocator: QuantizedAllocator, batch: Batch, layer_idx: int, routes: Routes):
        self.allocator, self.batch, self.layer_idx, self.routes = allocator, batch, layer_idx, routes
        self.layer = allocator.layers[layer_idx]
        self.exact_block = allocator.exact_block(layer_idx)
        self.backend, self.is_stored = allocator.kv_config.backend, False

    def append(self, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> None:
        key, value = (x[:, :, rows.unseen :] for x in (key, value))
        self.layer.append(key, value, rows.place(self.exact_block), self.allocator.faults)
        if self.allocator.device.type == "cpu":
            _tell_faults(self.allocator)


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
    unknown += ["dropout"] * bool(kwargs.get("dropout")) + ["attention_mask"] * (attention_mask is not None)
    if kwargs.get("sliding_window") not in (None, key.update.allocator.sliding_window):
        unknown.append("sliding_window")
    if unknown:
        raise ValueError(f"attention argument {unknown[0]!r}: {_NOT_SERVED}")
    update, keys, values = key.update, key.new, value.new
    if update.is_stored:
        raise ValueError(f"layer {update.layer_idx} attends twice to the same states: {_NOT_SERVED}")
    update.is_stored = True
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    softcap, s_aux = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
    dense_kwargs = {name: x for name, x in kwargs.items() if name not in _OF_BATCHES}
    # transformers' eager attention is causal by its mask only.
    config: Any = getattr(module, "config", None)
    is_eager = str(attn_implementation(config)).endswith("eager")
    has_kernel = not (is_eager or softcap or s_aux is not None) and ops.takes_prompts(query, update.backend)
    output = query.new_empty(1, query.shape[2], query.shape[1], values.shape[-1])

    for each, has_past in ((update.batch.first, False), (update.batch.long, True)):
        for rows in each:
            q, k, v = (x[:, :, rows.at] for x in (query, keys, values))
            new, mask = (k, v), None
            if has_past:
                n = q.shape[2]
                k, v = update.layer.past(rows.before(update.exact_block), 0, n)
                k[:, :, -n:], v[:, :, -n:] = new
            update.routes.count("decode_dequantized" if has_past else "prefill_dense")
            if has_kernel:
                attended = ops.prompt_attention(q, k, v, update.allocator.window, scaling=float(scaling))
            else:
                if has_past or is_eager or rows.hides_columns():
                    mask = rows.mask(query.dtype)
                attended = dense_attention(module, q, k, v, mask, **dense_kwargs)[0]
            output[:, rows.at] = attended
            update.append(*new, rows)
    for rows in update.batch.short:
        # [1, heads, tokens, head_dim] -> [requests, heads, 1, head_dim]
        q, k, v = (x[0, :, rows.at].transpose(0, 1)[:, :, None] for x in (query, keys, values))
        update.append(k, v, rows)
        states = update.layer.states(rows.after(update.exact_block))
        update.routes.count("decode_fused")
        attended, _ = ops.paged_attention(q, *states, s_aux, scaling=float(scaling), softcap=float(softcap))
        output[0, rows.at] = attended[:, :, 0]
    return output, None


_lock = threading.Lock()


def paged_cache(kv_config: KVQuantConfig | None, **kwargs: Any) -> Any:
    """The paged cache of a manager: quantized, or transformers' own if `kv_config` is None.

    transformers looks its allocators up in a table of the module; no other cache is made while it holds ours.
    """
    with _lock:
        if kv_config is None:
            return _HOST.PagedAttentionCache(**kwargs)
        allocators: dict[str, Any] = {kind: partial(each, kv_config) for kind, each in ALLOCATORS.items()}
        for kind, allocator in allocators.items():
            allocator.supports_block_table = ALLOCATORS[kind].supports_block_table
        with _HOST.replaced(allocators, _MemoryHandler):
            return QuantizedPagedCache(kv_config, **kwargs)


def refuse_unserved(model: Any, kv_config: KVQuantConfig, options: Any) -> None:
    """Check that quantized pages serve this model and these options of a `ContinuousBatchingConfig`.

    Raises:
        ValueError: they do not; what stands in the way is named.
    """
    text_config = model.config.get_text_config()
    check_layers(kv_config.error_feedback, text_config.num_hidden_layers)
    attention = attn_implementation(text_config)
    # None is as much memory as there is.
    has_pool = model.device.type == "cpu" and options.cpu_offload_space != 0
    graphs = options.use_cuda_graph if isinstance(options.use_cuda_graph, tuple) else (options.use_cuda_graph,)
    obstacles = {
        "static": kv_config.static,
        "offload": kv_config.offload,
        "window_length": kv_config.windows,
        "device": model.device.type not in ("cpu", "cuda") and model.device.type,
        "attn_implementation": attention not in ("sdpa", "eager", "paged|eager") and attention,
        "use_async_batching": options.use_async_batching,
        "cpu_offload_space": has_pool and repr(options.cpu_offload_space),
        "use_cuda_graph": any(graphs),
        "varlen_compile_config": options.varlen_compile_config,
        "decode_compile_config": options.decode_compile_config,
        "default_compile_level": options.default_compile_level,
    }
    for name, found in obstacles.items():
        if found:
            raise ValueError(f"{name}: {found} is {_NOT_SERVED}; expected {_SERVED.get(name, 'none')}")
    try:
        groups = _HOST.group_layers(text_config)
    except ValueError as error:
        raise ValueError(
            f"layer_types: {type(model).__name__} has layers that are {_NOT_SERVED} ({error}); "
            "expected full and sliding attention"
        ) from error
    # The manager makes its own later, when the first request comes.
    for kind, layers in groups.items():
        allocator = ALLOCATORS[kind](
            kv_config, index=0, config=text_config, num_key_value_heads=_HOST.find_num_key_value_heads(text_config),
            cache_dtype=model.dtype, page_size=options.page_size, layer_indices=layers,
            allow_block_sharing=options.allow_block_sharing,
        )  # fmt: skip
        for layout in allocator.layouts:
            head_dims = layout.head_dim, layout.head_dim
            ops.check_formats(*layout.specs, kv_config.backend, model.device, model.dtype, head_dims)


_SERVED = {
    "static": "false",
    "offload": "false",
    "window_length": repr(ALL),
    "use_async_batching": "False, because a step waits for the one before it when it copies its tables to the device",
    "cpu_offload_space": "0 on a CPU, where pages are in the main memory",
    "use_cuda_graph": "False, because a graph would read the tables of the step that it was captured in",
    "device": "'cpu' or 'cuda'",
    "attn_implementation": "'sdpa' or 'eager'",
}
