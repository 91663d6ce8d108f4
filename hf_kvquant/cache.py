"""`QuantizedCache`: a transformers cache whose layers are stored quantized, those with full attention or a window.

    cache = QuantizedCache(config=model.config, kv_config="int4")
    with hf_kvquant.attention(model):
        model(input_ids, cache=cache)  # past_key_values= before transformers 5.24

Its layers (`layers.py`) store and return the states. This file has what concerns all layers: making them, whole
changes, and saving. Linear and cross-attention layers stay transformers' own.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from . import expected, saving
from .changes import WholeChanges
from .config import ALL, KVQuantConfig
from .cross_attention import CrossAttentionLayer, StaticCrossAttentionLayer
from .evicting import EvictingQuantizedLayer
from .feedback import check_layers
from .host import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    context_length,
    cross_attention_layers,
)
from .hybrid import (
    EvictingQuantizedHybridLayer,
    QuantizedHybridLayer,
    SlidingQuantizedHybridLayer,
    StaticQuantizedHybridLayer,
    StaticSlidingQuantizedHybridLayer,
)
from .layers import QuantizedLayer
from .message import told
from .offloading import OffloadedLayers, check_device, is_offloaded_kind
from .route import ROUTES, Routes, say_once
from .sliding import SlidingQuantizedLayer
from .states import hides_columns
from .static import DeviceRoutes, StaticQuantizedLayer, keep_in_place
from .static_sliding import StaticSlidingQuantizedLayer
from .storage import HOST, storage_nbytes

# Models whose code treats all of the storage as tokens: with transformers' StaticCache, too, they fail or give wrong
# logits. (BLOOM does not, but needs the first states in all of the storage.)
_NEVER_STATIC = frozenset({
    "bloom", "encoder-decoder", "fsmt", "git", "gpt_neo", "inkling2_text", "inkling_text", "led", "prophetnet",
})  # fmt: skip

# What is quantized in the place of transformers' own layers.
_GROWING: dict[type, Any] = {
    DynamicLayer: QuantizedLayer,
    LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer,
    DynamicSlidingWindowLayer: SlidingQuantizedLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: SlidingQuantizedHybridLayer,
}
# Their counterparts for layers whose config has a `window_length`.
_EVICTING: dict[type, Any] = {
    DynamicLayer: EvictingQuantizedLayer,
    LinearAttentionAndFullAttentionLayer: EvictingQuantizedHybridLayer,
}
_STATIC: dict[type, Any] = {
    StaticLayer: StaticQuantizedLayer,
    LinearAttentionAndStaticFullAttentionLayer: StaticQuantizedHybridLayer,
    StaticSlidingWindowLayer: StaticSlidingQuantizedLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer: StaticSlidingQuantizedHybridLayer,
}
_SLIDING = {
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    StaticSlidingWindowLayer,
}


class QuantizedCache(OffloadedLayers, WholeChanges, DynamicCache):
    """A cache for `generate`, or for plain forward calls inside of `hf_kvquant.attention(model)`.

    It is passed as `cache`, before transformers 5.24 as `past_key_values`. Full-attention layers are quantized, and
    sliding layers as the config's `sliding` says; linear and cross-attention layers stay transformers' own. A window
    that hides no token is ignored.

    Args:
        config: the model's config.
        kv_config: `KVQuantConfig`, a preset's name, a YAML path or a dict.
        max_length: the number of tokens to allocate storage for at once; None grows it geometrically. A static cache
            needs it, and holds no more.
        attention_mask: `[batch, kv_len]`, 0 for padding among the first tokens; see `set_padding`.
        reach: a sliding window of at least this many tokens is ignored, and its layer counts as full attention; None:
            `max_length` or the context length of the model, whichever is less.

    Raises:
        ValueError: the model has no layer to quantize or cannot have a static cache, or the config overrides a layer
            that cannot be quantized, or has the error feedback of a model with more layers.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kv_config: KVQuantConfig | str | Path | dict,
        max_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        reach: int | None = None,
    ):
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config: a {type(config).__name__} is not allowed; expected a model's config")
        if max_length is not None:
            max_length = _length(max_length)
        self._config = config
        self.kv_config = KVQuantConfig.load(kv_config).for_model(config)
        check_layers(self.kv_config.error_feedback, config.get_text_config(decoder=True).num_hidden_layers)
        if self.kv_config.static and not max_length:
            raise ValueError(
                f"max_length: {max_length!r} is not allowed for a static cache; expected the number of tokens that it "
                "has room for"
            )
        kind = {config.model_type, config.get_text_config(decoder=True).model_type} & _NEVER_STATIC
        if self.kv_config.static and kind:
            raise ValueError(
                f"static: True is not allowed for a model of type {min(kind)!r}, whose code takes all columns of "
                "a storage for tokens; expected a cache that grows"
            )
        # The cache of the unconditional pass in guided generation; it is counted with this one.
        self.unconditional: QuantizedCache | None = None
        # State of this generation that the model keeps outside of its cache; see `host.GENERATION_STATE`.
        self.model_state: dict[str, torch.Tensor | int | None] = {}
        # The adapters of the last call of the model, by module; None if no call is known.
        self.adapters: dict[str, dict] | None = None
        self._routes = Routes()
        self._max_length = max_length
        self._reach = reach or min((n for n in (max_length, context_length(config)) if n), default=None)
        layers = self._native_layers()
        kinds = _STATIC if self.kv_config.static else _GROWING
        quantizable = [i for i, layer in enumerate(layers) if type(layer) in kinds]
        windows = self._windows(layers)
        chosen = [i for i in quantizable if self.kv_config.quantizes(i, windows[i])]
        if not chosen:
            names = sorted({type(layer).__name__ for layer in layers})
            wide = "" if not quantizable else f" or a window that `sliding: {self.kv_config.sliding}` takes"
            raise ValueError(
                f"{config.model_type}: none of the {len(layers)} layers has full attention{wide} (they are "
                f"{', '.join(names)}): nothing to quantize"
            )
        for layer_idx, _ in self.kv_config.layers:
            if layer_idx not in quantizable:
                such = "full-attention or sliding layer" if any(windows) else "full-attention layer"
                raise ValueError(f"layers.{layer_idx}: the model has no such {such}; expected one of {quantizable}")
        evicting = self._evicting(chosen)
        stored = {
            i: self.kv_config
            for i in chosen
            if i in evicting or not all(s.is_dense for s in self.kv_config.for_layer(i))
        }
        if self.kv_config.static and any(windows[i] for i in stored):
            # One mask serves all sliding layers, and it has other columns than transformers' static ones.
            others = [i for i in quantizable if windows[i] and i not in stored]
            stored |= {i: self.kv_config.with_dense(i) for i in others}
        for layer_idx, layer_config in stored.items():
            native, window = layers[layer_idx], evicting.get(layer_idx, windows[layer_idx])
            kind = (_EVICTING if layer_idx in evicting else kinds)[type(native)]
            arguments = (layer_config, layer_idx, self._routes, max_length)
            layers[layer_idx] = kind(*arguments, *([] if window is None else [window]))
            if isinstance(native, LinearAttentionLayer):
                layers[layer_idx].set_linear_states(native.number_of_states)
        for layer in layers:
            if isinstance(layer, StaticQuantizedLayer):
                # Full and sliding layers have a mask each.
                layer.is_beside_dense = any(
                    type(other) in kinds and other.is_sliding == layer.is_sliding for other in layers
                )
        Cache.__init__(self, layers=layers)
        # transformers' name for it. Its own `update` does not run then.
        self.offloading = self.kv_config.offload
        self._whole = self._lengths()
        if attention_mask is not None:
            self.set_padding(attention_mask)

    def _native_layers(self) -> list[Any]:
        """The layers that transformers' own cache of this kind would have, without windows that hide nothing."""
        static, crossing = self.kv_config.static, cross_attention_layers(self._config)
        if static:
            layers = StaticCache(self._config.get_text_config(decoder=True), max_cache_len=self._max_length).layers
        else:
            layers = DynamicCache(config=self._config).layers
        growing: Any
        for i, growing in enumerate(DynamicCache(config=self._config).layers):
            if i in crossing:
                layers[i] = StaticCrossAttentionLayer() if static else CrossAttentionLayer()
            elif type(growing) in _SLIDING and not hides_columns(growing.sliding_window, self._reach):
                if isinstance(growing, LinearAttentionLayer):
                    states = growing.number_of_states
                    full = LinearAttentionAndFullAttentionLayer, LinearAttentionAndStaticFullAttentionLayer
                    layers[i] = full[1](self._max_length, states) if static else full[0](states)
                else:
                    layers[i] = StaticLayer(self._max_length) if static else DynamicLayer()
        return layers

    def _windows(self, layers: list[Any]) -> list[int | None]:
        """The window of each of `_native_layers` that has one."""
        # transformers' static layers do not keep it.
        known = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=self._config).layers]
        return [window if type(layer) in _SLIDING else None for layer, window in zip(layers, known)]

    def _evicting(self, chosen: list[int]) -> dict[int, int]:
        """The `window_length` of each chosen layer that has one.

        Raises:
            ValueError: a sliding layer shall have one, or no layer can.
        """
        own = [type(layer) in _SLIDING for layer in DynamicCache(config=self._config).layers]
        for i, override in self.kv_config.layers:
            if own[i] and isinstance(override.window_length, int):
                raise ValueError(
                    f"layers.{i}.window_length: {override.window_length} is not allowed for a sliding layer, which "
                    "has a window of its own; expected a full-attention layer"
                )
        evicting = {i: self.kv_config.window(i) for i in chosen if not own[i]}
        if self.kv_config.window_length != ALL and not evicting:
            raise ValueError(
                f"window_length: {self.kv_config.window_length} is not allowed for {self._config.model_type}, whose "
                f"layers all have windows of their own; expected {ALL!r}"
            )
        return {i: window for i, window in evicting.items() if window is not None}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"layer_idx: {layer_idx} is not in this cache of {len(self.layers)} layers; expected the model whose "
                "config it was made with"
            )
        update = self._update_offloaded if self.offloading else super().update
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> QuantizedCache:
        self.settle()
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    @property
    def is_empty(self) -> bool:
        """Whether no quantized layer holds a token."""
        return not any(layer.is_filled for layer in self.quantized_layers)

    @property
    def routes(self) -> dict[str, int]:
        """How often each route was taken, summed over layers: `prefill_dense`, `decode_fused`, `decode_dequantized`,
        and `window_lost` (crops beyond the exact window) and `nonfinite` (token vectors with a NaN or infinity)."""
        nonfinite = sum(int(layer.faults[0]) for layer in self.quantized_layers if layer.is_initialized)
        counts = self._counted_routes() + Counter(nonfinite=nonfinite)
        if self.unconditional is not None:
            counts += Counter(self.unconditional.routes)
        return {name: counts[name] for name in (*ROUTES, "nonfinite")}

    def _counted_routes(self) -> Counter:
        on_devices = (layer.routes for layer in self.quantized_layers if isinstance(layer.routes, DeviceRoutes))
        return sum((routes.known() for routes in on_devices), Counter(self._routes))

    def set_padding(self, attention_mask: torch.Tensor, of_last: bool = False) -> None:
        """Say which columns are padding, `[batch, kv_len]` with 0 for padding; columns beyond the mask are tokens.

        Padding does not influence the scales of blocks, and is never a sink. Columns that are stored already keep the
        padding that was set before.

        Args:
            of_last: if the first update stores more columns than the mask has, the mask is for the last of them,
                because models put the tokens of an image or of a learned prompt before those of the text.

        Raises:
            ValueError: the mask is not 2-D, is additive, or its batch differs from the cache's.
        """
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"attention_mask: a {type(attention_mask).__name__} is not allowed; expected a tensor")
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)} is not allowed; expected [batch, kv_len]"
            )
        if (attention_mask < 0).any():
            raise ValueError("attention_mask: negative numbers are not allowed; expected 0 for padding, 1 for tokens")
        for layer in self.quantized_layers:
            layer.set_padding(attention_mask == 0, of_last)

    def reserve(self, max_length: int) -> None:
        """Make room for `max_length` tokens, at once.

        Raises:
            ValueError: `max_length` is not a number of tokens.
        """
        max_length = _length(max_length)
        self.settle()
        for layer in self.quantized_layers:
            layer.reserve(max_length)

    def enable_fused(self) -> None:
        """Give attention the states as they are stored from now on, as a prefill through the model would have found
        out that it can: for caches that are filled without one."""
        for layer in self.quantized_layers:
            layer.takes_states = True

    def disable_fused(self, reason: str) -> None:
        """Read de-quantized states from now on, through the model's own attention."""
        say_once(f"The quantized KV cache is read through de-quantized copies: {reason}.")
        for layer in self.quantized_layers:
            layer.takes_states = False

    def save(self, path: str | Path, model: torch.nn.Module | PreTrainedConfig | None = None) -> None:
        """Write the cache to a safetensors file, as a whole or not at all: until it is complete, an old file stays.

        A file that is replaced gives its permissions and, if the system allows it, its owner to the new one. A
        symbolic link is followed, and the file behind it is replaced. Temporary files that killed processes left of
        an earlier `save` to this path are removed.

        This saves the self-attention cache of an encoder-decoder model; cross-attention is computed anew from the
        encoder's inputs.

        Args:
            model: the model that computed the cache, perhaps in a `PeftModel`. Its weights are sampled, so that
                `load` can tell it from a fine-tuned twin, and its active adapters are recorded. Without it, or with
                its config, only the config is recorded.

        Raises:
            ValueError: the cache is empty or was interrupted, `path` is not allowed, `model` has another config or
                weights that cannot be read, or one of transformers' own layers holds something that cannot be stored.
            OSError: the file cannot be written.
        """
        if not any(self._lengths()):
            raise ValueError("the quantized cache is empty; expected at least one token to save")
        self.check_finished()
        self.settle()
        who = saving.identity(self._config if model is None else model)
        if who["config"] != saving.identity(self._config)["config"]:
            raise ValueError("model: its config is not the cache's; expected the model that computed the cache")
        # Where layers are is not the content of a file.
        kv_config = replace(self.kv_config, offload=False)
        description = {"kv_config": kv_config.to_dict(), "model": who, "length": self.get_seq_length()}
        layers = [layer.state() if isinstance(layer, QuantizedLayer) else vars(layer) for layer in self.layers]
        kinds = [type(layer).__name__ for layer in self.layers]
        state = {"kinds": kinds, "layers": layers, "routes": dict(self._counted_routes())}
        packed = saving.pack(state | {"reach": self._reach, "model_state": self.model_state})
        # A file that `load` would refuse must not be written.
        fresh = QuantizedCache(self._config, kv_config, self._max_length, reach=self._reach)
        for i, (layer, state) in enumerate(zip(fresh.layers, layers)):
            expected.check(state, partial(_expected, layer, state), f"layers.{i}")
        saving.write(path, description, packed)

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        path: str | Path,
        config: PreTrainedConfig | torch.nn.Module,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        offload: bool = False,
        verify: bool = True,
        mmap: bool = True,
    ) -> QuantizedCache:
        """The cache that `save` wrote, with the same bytes, ready for more tokens.

        The file is mapped, not read: on the CPU the quantized body stays in the map until the first append needs room.
        A mapped file may be replaced (as `save` does) or deleted, but must not be shortened in place: reading the
        missing part ends the process (SIGBUS). `mmap=False` reads the file at once, and is safe from that.

        Args:
            config: the model that will use the cache, perhaps in a `PeftModel`, or its config. If it is the model, its
                weights and active adapters are compared too.
            max_length: the number of tokens to make room for at once; this reads the body into memory. A static cache
                needs it.
            device: the device of the layers; None: the model's device, or the CPU if a config is given.
            offload: the config's `offload`, which files do not keep. The layers stay in the main memory, and come to
                the device one by one.
            verify: compare the checksum of the tensors, which reads the file once; False trusts the disk.
            mmap: map the file; False reads it into memory.

        Raises:
            ValueError: the file cannot be read, was cut short or damaged, has another format version, does not fit a
                cache of its config, or was computed by another model or with other adapters; or one of transformers'
                static layers was saved for another `max_length`.
        """
        if max_length is not None:
            max_length = _length(max_length)
        file = saving.read(path, mmap)
        file.check_model(config)
        if verify:
            file.verify()
        model: Any = saving.base_model(config)
        is_model = isinstance(model, PreTrainedModel)
        if device is None:
            device = model.device if is_model else "cpu"
        try:
            # Before files said anything about sliding layers, those were not quantized.
            kv_config = KVQuantConfig.from_dict({"sliding": "dense"} | file.description["kv_config"])
        except ValueError as error:
            raise ValueError(f"{path}: kv_config.{error}") from None
        kv_config = replace(kv_config, offload=offload)
        if offload:
            check_device(torch.device(device))
        state: Any = file.state(HOST if offload else device)
        # Files of the first version have neither of these.
        added: dict[str, Any] = {"reach": frozenset({None, expected.COUNT}), "model_state": dict}
        added = {name: pattern for name, pattern in added.items() if isinstance(state, dict) and name in state}
        if "reach" in added:
            expected.check(state["reach"], lambda: added["reach"], f"{path}: reach")
        cache = cls(
            model.config if is_model else model, kv_config, max_length if kv_config.static else None,
            reach=state["reach"] if "reach" in added else None,
        )  # fmt: skip
        kinds = [type(layer).__name__ for layer in cache.layers]
        pattern = {"kinds": list, "layers": [dict] * len(kinds), "routes": dict} | added
        if isinstance(state, dict) and state.get("kinds") != kinds:
            has = told(state.get("kinds"))
            raise ValueError(f"{path}: has layers {has}; this version of transformers makes {kinds}")
        expected.check(state, lambda: pattern, f"{path}: the state")
        expected.check(
            state["routes"], lambda: {name: expected.COUNT for name in ROUTES if name in state["routes"]},
            f"{path}: routes",
        )  # fmt: skip
        for layer_idx, (layer, saved) in enumerate(zip(cache.layers, state["layers"])):
            if not isinstance(layer, QuantizedLayer):
                _check_attributes(layer, layer_idx, saved, path, max_length)
            where = f"{path}: layers.{layer_idx}"
            if offload:
                saved = tree_map(partial(_moved, torch.device(device)), saved)
            expected.check(saved, partial(_expected, layer, saved), where)
            if isinstance(layer, QuantizedLayer):
                layer.restore(saved, device)
            else:
                vars(layer).update(saved)
                if kv_config.static:
                    keep_in_place(x for x in saved.values() if isinstance(x, torch.Tensor))
            if offload and is_offloaded_kind(layer):
                layer.offload()
        cache.model_state = state.get("model_state", {})
        expected.check(cache.model_state, lambda: expected.model_state(cache.model_state), f"{path}: model_state")
        cache._routes.update(state["routes"])
        cache.end()
        cache._check_whole(state, file.description["length"], path)
        if max_length is not None:
            cache.reserve(max_length)
        return cache

    def _check_whole(self, state: dict, length: int, path: str | Path) -> None:
        """Check that the layers of a file agree about tokens and rows."""
        lengths = {tokens for tokens in self._lengths() if tokens}
        if lengths != {length} or self.get_seq_length() != length:
            raise ValueError(f"{path}: has layers of {sorted(lengths)} tokens; expected {length}, as its length says")
        rows = {x.shape[0] for x in tree_leaves(state["layers"]) if isinstance(x, torch.Tensor) and x.ndim > 1}
        if len(rows) != 1:
            raise ValueError(f"{path}: has tensors of {sorted(rows)} rows; expected one batch")

    def take_over(self, other: DynamicCache) -> None:
        """Turn this empty cache into a quantized copy of a dense cache with the same layers.

        Raises:
            ValueError: one of its layers is of another kind than the model's.
        """
        for layer in self.quantized_layers:
            # A mask that is already set is dropped, because its columns come after these tokens.
            layer.padding = None
        for layer_idx, (layer, dense) in enumerate(zip(self.layers, other.layers)):
            if not isinstance(dense, DynamicLayer) or not isinstance(layer, DynamicLayer):
                raise ValueError(
                    f"layer {layer_idx}: a {type(dense).__name__} cannot be taken over; expected a DynamicLayer"
                )
            if dense.is_initialized:
                layer.update(dense.keys, dense.values)
                if self.offloading:
                    layer.offload()
        for layer in self.quantized_layers:
            # No attention saw the return values of these updates.
            layer.was_offered = False
        self.end()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive argument does what the installed transformers does.

        A forward call that was interrupted is forgotten first, so that `crop(0)` makes the cache usable again.

        Raises:
            ValueError: the argument is not an integer, or an interrupted change cannot be undone: only `reset` helps.
            RuntimeError: one of transformers' own layers cannot be cropped; nothing has changed.
        """
        try:
            # Some versions of transformers pass a tensor.
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove!r} is not allowed; expected an integer") from None
        self._forget_unfinished()
        with self._change("crop"):
            try:
                # Layers that may refuse come first; ours are asked before any is changed.
                for layer in self.quantized_layers:
                    layer.tokens_after(tokens_to_remove)
                for layer in sorted(self.layers, key=lambda layer: isinstance(layer, QuantizedLayer)):
                    layer.crop(tokens_to_remove)
            except Exception:
                if self._lengths() == self._whole:
                    self._unfinished = None
                raise

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._choose_rows("beam_idx", lambda rows: rows.index_select(0, beam_idx.cpu()))
        with self._change("reorder_cache"):
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose_rows("repeats", lambda rows: rows.repeat_interleave(repeats))
        with self._change("batch_repeat_interleave"):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        select = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        self._choose_rows("indices", lambda rows: rows[select])
        with self._change("batch_select_indices"):
            super().batch_select_indices(indices)

    def _choose_rows(self, name: str, select: Callable) -> None:
        """Check, before any layer is changed, that `select` picks rows of the batch; apply it to the model's state."""
        layer = next((layer for layer in self.quantized_layers if layer.is_initialized), None)
        if layer is None:
            return
        batch = layer.sink_positions.shape[0]
        try:
            rows = select(torch.arange(batch))
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name}: does not fit the cache's batch {batch} ({error})") from None
        if rows.ndim != 1 or not len(rows):
            raise ValueError(f"{name}: selects rows of shape {tuple(rows.shape)}; expected one dimension, not empty")
        for key, value in self.model_state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
                self.model_state[key] = value[rows.to(value.device)]

    def reset(self) -> None:
        self._close_steps(is_whole=False)
        for layer, new in zip(self.layers, self._native_layers()):
            if isinstance(layer, QuantizedLayer):
                layer.reset()
            else:
                # Some versions of transformers leave zeros, to which later tokens would be appended.
                kept = {"record_past": layer.record_past} if hasattr(layer, "record_past") else {}
                vars(layer).update(vars(new) | kept)
        self.model_state = {}
        self.end()

    def memory_report(self) -> dict[str, int]:
        """Bytes of the cache's tensors.

        `codes` and `scales` (with zero points) of the stored tokens, `dense` (rings, sinks and their positions,
        padding, and everything that is not quantized), `slack` (allocated, unused), their `total`, and
        `dense_equivalent`: the size of the same tokens in the model's dtype. With `offload: true` also `offloaded`:
        what part of the total is in the main memory now. With `error_feedback` also `factors`, which all caches of a
        process share, and which are not in the total.
        """
        names = ["codes", "scales", "dense", "slack", "total", "dense_equivalent", *["offloaded"] * self.offloading]
        names += ["factors"] * (self.kv_config.error_feedback is not None)
        report = Counter(dict.fromkeys(names, 0))
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                report.update(layer.memory_report())
            else:
                nbytes = storage_nbytes(vars(layer))
                report.update({"dense": nbytes, "total": nbytes, "dense_equivalent": nbytes})
                if self.offloading and is_offloaded_kind(layer) and layer.is_initialized:
                    report["offloaded"] += nbytes * (layer.keys.device != layer.device)
        if self.unconditional is not None:
            report.update(self.unconditional.memory_report())
        return dict(report)


def _length(max_length: Any) -> int:
    """The number of tokens as an `int`: numpy's integers and tensors of one are taken too."""
    try:
        length = operator.index(max_length)
    except TypeError:
        length = -1
    if length < 0:
        raise ValueError(f"max_length: {told(max_length)} is not allowed; expected a number of tokens")
    return length


def _expected(layer: CacheLayerMixin, state: dict) -> dict:
    """The pattern for the state of a layer of the same kind as `layer`, which is fresh."""
    return layer.expected(state) if isinstance(layer, QuantizedLayer) else expected.native(layer, state)


def _moved(device: torch.device, value: Any) -> Any:
    """A leaf of a layer's state on a device."""
    if isinstance(value, torch.device):
        return device
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _check_attributes(
    layer: CacheLayerMixin, layer_idx: int, saved: dict, path: str | Path, max_length: int | None
) -> None:
    """Check attributes and static lengths, which depend on the version of transformers, with messages of their own."""
    missing = sorted(vars(layer).keys() - saved.keys())
    if missing:
        raise ValueError(f"{path}: lacks {missing} of a {type(layer).__name__} of this version of transformers")
    columns, room = saved.get("max_cache_len"), getattr(layer, "max_cache_len", None)
    # A static layer for an image is as long as its image, and has no room before the image comes.
    if room != 0 and columns != room:
        raise ValueError(
            f"max_length: {max_length} is not allowed; layer {layer_idx}, a {type(layer).__name__}, has "
            f"{told(columns)} columns in the file and would have {room}; expected the number that the cache was made "
            "with"
        )
