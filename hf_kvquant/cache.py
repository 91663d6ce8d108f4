"""`QuantizedCache`: a transformers cache whose full-attention layers are stored quantized.

    cache = QuantizedCache(config=model.config, kv_config="int4")
    with hf_kvquant.attention(model):
        model(input_ids, past_key_values=cache)

`update` decides the route, and says it by the type that it returns: a tensor means dense attention, a
`QuantizedStates` the fused operator. The first update returns the states it was given (prefill is exact); a later one
of at most `DECODE_MAX` tokens returns `QuantizedStates` where the model takes them; a longer one the de-quantized past
and the new states.

Whether a model takes them is learned, not listed: the tensors of the first update are fresh views tagged with their
layer. If those very objects arrive at attention, and nothing else has used them, nothing stood in between.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from . import ops, saving
from .config import KVQuantConfig
from .quantization import QuantSpec
from .states import QuantizedStates

# The longest update that is read as stored: decode, speculative verify, short chunks. Part of the cache's definition.
DECODE_MAX = 32
# How far a rollback may go back and still find exact copies of what its next query reads.
ROLLBACK = 64
STATES_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FIRST_CAPACITY = 256
FORWARD = "forward call"
_TAG = "_kvquant_layer"


class QuantizedCache(DynamicCache):
    """A cache for `generate` (as `past_key_values`) or for plain forward calls inside `hf_kvquant.attention(model)`.

    Full-attention layers are quantized; sliding and linear layers stay transformers' own.

    Args:
        config: the model's config.
        kv_config: `KVQuantConfig`, a preset's name, a YAML path or a dict.
        max_length: tokens to allocate storage for at once; None grows it geometrically.
        attention_mask: `[batch, kv_len]`, 0 where the first tokens are padding; see `set_padding`.

    Raises:
        ValueError: the model has no full-attention layer, or the config overrides a layer that cannot be quantized.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kv_config: KVQuantConfig | str | Path | dict,
        max_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ):
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config: a {type(config).__name__} is not allowed; expected a model's config")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 0):
            raise ValueError(f"max_length: {max_length!r} is not allowed; expected a number of tokens or None")
        self._config = config
        self.kv_config = KVQuantConfig.load(kv_config)
        self._routes = Counter()
        self._unfinished: str | None = None
        layers = DynamicCache(config=config).layers
        kinds = {DynamicLayer: QuantizedLayer, LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer}
        quantizable = [i for i, layer in enumerate(layers) if type(layer) in kinds]
        if not quantizable:
            names = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(
                f"{config.model_type}: none of the {len(layers)} layers has full attention (they are "
                f"{', '.join(names)}): nothing to quantize"
            )
        for layer_idx, _ in self.kv_config.layers:
            if layer_idx not in quantizable:
                raise ValueError(
                    f"layers.{layer_idx}: the model has no such full-attention layer; expected one of {quantizable}"
                )
        for layer_idx in quantizable:
            specs = self.kv_config.for_layer(layer_idx)
            if not all(spec.is_dense for spec in specs):
                native = layers[layer_idx]
                layers[layer_idx] = kinds[type(native)](self.kv_config, layer_idx, self._routes, max_length)
                if isinstance(native, LinearAttentionLayer):
                    layers[layer_idx].set_linear_states(native.number_of_states)
        Cache.__init__(self, layers=layers)
        self._whole = self._lengths()
        if attention_mask is not None:
            self.set_padding(attention_mask)

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def routes(self) -> dict[str, int]:
        """How often each route was taken, summed over layers: `prefill_dense`, `decode_fused`, `decode_dequantized`,
        and `window_lost` (crops beyond the exact window) and `nonfinite` (token vectors with a NaN or infinity)."""
        names = ("prefill_dense", "decode_fused", "decode_dequantized", "window_lost")
        nonfinite = sum(int(layer.nonfinite) for layer in self.quantized_layers if layer.is_initialized)
        return {name: self._routes[name] for name in names} | {"nonfinite": nonfinite}

    def set_padding(self, attention_mask: torch.Tensor) -> None:
        """Say which columns are padding, `[batch, kv_len]` with 0 for padding; columns beyond the mask are tokens.

        Padding never enters a block's statistics and is no sink. Columns that are stored already keep what was said.

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
            layer.set_padding(attention_mask == 0)

    def reserve(self, max_length: int) -> None:
        """Make room for `max_length` tokens, at once."""
        for layer in self.quantized_layers:
            layer.reserve(max_length)

    def disable_fused(self, reason: str) -> None:
        """Read de-quantized states from now on, through the model's own attention."""
        say_once(f"The quantized KV cache is read through de-quantized copies: {reason}.")
        for layer in self.quantized_layers:
            layer.takes_states = False

    def save(self, path: str | Path, model: PreTrainedModel | None = None) -> None:
        """Write the cache to a safetensors file, as a whole or not at all: what `path` held before stays until then.

        Of an encoder-decoder model's cache this is the self-attention part; the cross-attention part is computed
        anew from the encoder's inputs.

        Args:
            model: what computed the cache. Its weights are sampled, so that `load` can tell it from a fine-tuned twin;
                without it only the config is recorded.

        Raises:
            ValueError: the cache is empty or was interrupted, `path` is not possible, `model` has another config, or
                a layer of transformers' own holds something that cannot be stored.
            OSError: the file cannot be written.
        """
        if not any(self._lengths()):
            raise ValueError("the quantized cache is empty; expected at least one token to save")
        with self._change("save"):
            pass
        who = saving.identity(model or self._config)
        if who["config"] != saving.identity(self._config)["config"]:
            raise ValueError("model: its config is not the cache's; expected the model that computed the cache")
        description = {"kv_config": self.kv_config.to_dict(), "model": who, "length": self.get_seq_length()}
        layers = [layer.state() if isinstance(layer, QuantizedLayer) else vars(layer) for layer in self.layers]
        kinds = [type(layer).__name__ for layer in self.layers]
        saving.write(path, description, {"kinds": kinds, "layers": layers, "routes": dict(self._routes)})

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: PreTrainedConfig | PreTrainedModel,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        verify: bool = True,
    ) -> QuantizedCache:
        """The cache that `save` wrote: the same to the byte, and ready to go on.

        The file is mapped, not read: on the CPU the quantized body stays in the map until the first append needs room.

        Args:
            config: the model that shall use the cache, or its config; given the model, its weights are compared too.
            max_length: tokens to make room for at once; this reads the body into memory.
            device: where its layers go; None: the model's device, or the CPU if a config is given.
            verify: compare the checksum of the tensors, which reads the file once; False trusts the disk.

        Raises:
            ValueError: the file cannot be read, was cut short or damaged, has another format version, or was computed
                by another model.
        """
        file = saving.read(path)
        file.check_model(config)
        if verify:
            file.verify()
        is_model = isinstance(config, PreTrainedModel)
        if device is None:
            device = config.device if is_model else "cpu"
        cache = cls(config.config if is_model else config, file.description["kv_config"])
        state = file.state(device)
        kinds = [type(layer).__name__ for layer in cache.layers]
        if kinds != state["kinds"]:
            raise ValueError(f"{path}: has layers {state['kinds']}; this version of transformers makes {kinds}")
        for layer, saved in zip(cache.layers, state["layers"]):
            if isinstance(layer, QuantizedLayer):
                layer.restore(saved, device)
            elif vars(layer).keys() <= saved.keys():
                vars(layer).update(saved)
            else:
                missing = sorted(vars(layer).keys() - saved.keys())
                raise ValueError(
                    f"{path}: lacks {missing} of a {type(layer).__name__} of this version of transformers"
                )
        cache._routes.update(state["routes"])
        cache.end()
        if max_length is not None:
            cache.reserve(max_length)
        return cache

    def begin(self, what: str) -> None:
        """Note that a change of all layers has begun. If it never reaches `end`, because of an exception, Ctrl-C or
        lack of memory, the next use is refused, for layers may disagree about their tokens.

        Raises:
            ValueError: an earlier change did not reach its end.
        """
        gained = self._gained()
        if self._unfinished is not None and (any(gained.values()) or not self._can_go_back()):
            repair = "" if self._unfinished != FORWARD else "; cache.crop(0) forgets the tokens of that call"
            raise ValueError(
                f"the quantized cache was left in the middle of a {self._unfinished}{repair}; cache.reset() empties it"
            )
        if len(set(gained.values())) > 1:
            raise ValueError(
                f"the layers of the quantized cache disagree: since the last whole call they gained {gained} tokens; "
                "cache.crop(0) goes back to what all of them have, cache.reset() empties it"
            )
        self._unfinished, self._whole = what, self._lengths()

    def end(self) -> None:
        """The change that `begin` noted is complete."""
        self._unfinished, self._whole = None, self._lengths()

    def _lengths(self) -> list[int]:
        return [layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0 for layer in self.layers]

    def _gained(self) -> dict[int, int]:
        """By how many tokens each layer in use grew since the last complete change."""
        now = self._lengths()
        return {i: new - old for i, (new, old) in enumerate(zip(now, self._whole)) if new or old}

    def _can_go_back(self) -> bool:
        """Whether a forward call is all that was interrupted, of layers whose tokens are known by their length."""
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        return self._unfinished in (None, FORWARD) and not linear

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        self.begin(what)
        yield
        self.end()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive argument does what the installed transformers does.

        A forward call that was interrupted is forgotten first, so that `crop(0)` makes the cache usable again.

        Raises:
            ValueError: not an integer, or what was interrupted cannot be undone: only `reset` helps.
            RuntimeError: a layer of transformers' own cannot be cropped; nothing has changed.
        """
        try:
            # Some versions of transformers give a tensor.
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove!r} is not allowed; expected an integer") from None
        self._forget_unfinished()
        with self._change("crop"):
            try:
                # Those that may refuse come first.
                for layer in sorted(self.layers, key=lambda layer: isinstance(layer, QuantizedLayer)):
                    layer.crop(tokens_to_remove)
            except Exception:
                if self._lengths() == self._whole:
                    self._unfinished = None
                raise

    def _forget_unfinished(self) -> None:
        """Take back the tokens that some layers have of a forward call that did not reach all of them."""
        for layer in self.quantized_layers:
            layer.recover()
        gained = self._gained()
        if self._unfinished is None and len(set(gained.values())) <= 1:
            return
        target = 0 if self._unfinished else min(gained.values())
        ahead = {layer_idx: tokens - target for layer_idx, tokens in gained.items() if tokens > target}
        try:
            if not self._can_go_back():
                raise RuntimeError("the state of its layers before that is not known")
            for layer_idx, tokens in ahead.items():
                self.layers[layer_idx].crop(-tokens)
        except RuntimeError as error:
            raise ValueError(
                f"the quantized cache was interrupted and cannot go back ({error}); cache.reset() empties it"
            ) from None
        self.end()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._check_rows("beam_idx", lambda rows: rows.index_select(0, beam_idx.cpu()))
        with self._change("reorder_cache"):
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._check_rows("repeats", lambda rows: rows.repeat_interleave(repeats))
        with self._change("batch_repeat_interleave"):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        select = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        self._check_rows("indices", lambda rows: rows[select])
        with self._change("batch_select_indices"):
            super().batch_select_indices(indices)

    def _check_rows(self, name: str, select: Callable) -> None:
        """Whether `select` picks rows of the batch: tried on a small tensor, before any layer is changed."""
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

    def reset(self) -> None:
        for layer, new in zip(self.layers, DynamicCache(config=self._config).layers):
            if isinstance(layer, QuantizedLayer):
                layer.reset()
            else:
                # Some versions of transformers leave zeros, to which later tokens would be appended.
                kept = {"record_past": layer.record_past} if hasattr(layer, "record_past") else {}
                vars(layer).update(vars(new) | kept)
        self.end()

    def memory_report(self) -> dict[str, int]:
        """Bytes of the cache's tensors.

        `codes` and `scales` (with zero points) of the tokens stored, `dense` (rings, sinks and their positions,
        padding, and whatever is not quantized), `slack` (allocated, unused), their `total`, and `dense_equivalent`:
        the same tokens in the model's dtype.
        """
        report = Counter(dict.fromkeys(("codes", "scales", "dense", "slack", "total", "dense_equivalent"), 0))
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                report.update(layer.memory_report())
            else:
                nbytes = _storage_nbytes(vars(layer))
                report.update({"dense": nbytes, "total": nbytes, "dense_equivalent": nbytes})
        return dict(report)


class QuantizedLayer(DynamicLayer):
    """The keys and values of one layer, each in a `_Side`: a `DynamicLayer` that stores them elsewhere."""

    def __init__(self, kv_config: KVQuantConfig, layer_idx: int, routes: Counter, max_length: int | None = None):
        super().__init__()
        self.kv_config = kv_config
        self.layer_idx = layer_idx
        self.routes = routes
        self.max_length = max_length
        self.takes_states: bool | None = None
        self.padding: torch.Tensor | None = None
        self.length = 0
        # True while an append writes: what finds it True knows that the last append was interrupted.
        self.storing = False

    # `DynamicLayer` keeps its states in these two attributes; here they are a de-quantized copy for who looks inside.
    @property
    def keys(self) -> torch.Tensor | None:
        return self._next_read(self._keys)

    @keys.setter
    def keys(self, value: None) -> None:
        assert value is None, "the states of a quantized layer are written by update()"

    @property
    def values(self) -> torch.Tensor | None:
        return self._next_read(self._values)

    @values.setter
    def values(self, value: None) -> None:
        assert value is None, "the states of a quantized layer are written by update()"

    def _next_read(self, side: _Side) -> torch.Tensor | None:
        """What the next query reads: the one before might look for exact copies that a long crop has lost."""
        return self._states(side).dequantize(position=self.length) if self.is_initialized and self.length else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = key_states.shape[0]
        if self.padding is not None and self.padding.shape[0] != batch:
            raise ValueError(f"attention_mask: batch {self.padding.shape[0]} does not fit the states' batch {batch}")
        capacity = self.max_length or 0
        if capacity < key_states.shape[2]:
            capacity = max(_FIRST_CAPACITY, key_states.shape[2])
        config = self.kv_config
        sides = []
        for name, spec, states in zip(
            ("keys", "values"), config.for_layer(self.layer_idx), (key_states, value_states)
        ):
            try:
                spec = spec.resolve(states.shape[-1])
            except ValueError as error:
                raise ValueError(f"layer {self.layer_idx}: {name}.{error}") from None
            sides.append(_Side(spec, states, capacity, config.sink_length, config.recent_length))
        self._keys, self._values = sides
        with torch.inference_mode(False):
            self.padding = None if self.padding is None else self.padding.to(self.device)
            self.nonfinite = torch.zeros((), dtype=torch.int64, device=self.device)
            self.sink_positions = torch.full((batch, config.sink_length), -1, dtype=torch.int32, device=self.device)
        self.sinks_complete = config.sink_length == 0
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens `[batch, num_kv_heads, n, head_dim]` and return what attention shall read (the route)."""
        if not self.is_initialized:
            self._check_new(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        start, n = self.length, key_states.shape[2]
        if start == 0:
            self._append(key_states, value_states)
            self.routes["prefill_dense"] += 1
            return _tagged(key_states, self), _tagged(value_states, self)
        if n <= DECODE_MAX:
            self._append(key_states, value_states)
            states = self._states(self._keys), self._states(self._values)
            if self.takes_states:
                return states
            self.routes["decode_dequantized"] += 1
            self._say_dequantized()
            return tuple(s.dequantize(position=start) for s in states)
        past = [self._states(side).dequantize(position=start) for side in (self._keys, self._values)]
        self._append(key_states, value_states)
        self.routes["decode_dequantized"] += 1
        return tuple(torch.cat(pair, dim=2) for pair in zip(past, (key_states, value_states)))

    def _check_new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """What the first states of a layer must be; later ones must be like them."""
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if states.ndim != 4:
                shape = "[batch, num_kv_heads, n, head_dim]"
                raise ValueError(f"{name}: shape {tuple(states.shape)} is not allowed; expected {shape}")
            if states.dtype not in STATES_DTYPES:
                names = [str(dtype) for dtype in STATES_DTYPES]
                raise ValueError(f"{name}: {states.dtype} cannot be cached; expected one of {names}")
        if key_states.shape[:2] != value_states.shape[:2]:
            raise ValueError(
                f"value_states: batch and num_kv_heads {tuple(value_states.shape[:2])} do not fit the keys; expected "
                f"{tuple(key_states.shape[:2])}"
            )

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.storing:
            raise ValueError(
                f"layer {self.layer_idx} was interrupted while it stored tokens; cache.crop(0) goes back to the "
                f"{self.length} before them, cache.reset() empties the cache"
            )
        for name, states, side in (
            ("key_states", key_states, self._keys),
            ("value_states", value_states, self._values),
        ):
            batch, heads, _, head_dim = states.shape
            if (batch, heads, head_dim) != side.shape or states.dtype != self.dtype:
                raise ValueError(
                    f"{name}: {tuple(states.shape)} of {states.dtype} does not fit layer {self.layer_idx}; expected "
                    f"batch, num_kv_heads and head_dim {side.shape} of {self.dtype}"
                )
            if states.device != self.device:
                raise ValueError(
                    f"{name}: device {states.device} does not fit layer {self.layer_idx}; expected {self.device}"
                )
        if key_states.shape[2] != value_states.shape[2]:
            raise ValueError(
                f"value_states: {value_states.shape[2]} tokens do not fit the keys; expected {key_states.shape[2]}"
            )

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end, exact=False)
        self.storing = True
        # Before the ring is written, so that an interruption cannot leave it promising what it lost.
        for side in (self._keys, self._values):
            side.make_way(end)
        ops.quantize_append(
            key_states.detach(), value_states.detach(), self._states(self._keys), self._states(self._values),
            self.nonfinite, self.padding, start=start,
        )  # fmt: skip
        if not self.sinks_complete:
            self._append_sinks(key_states.detach(), value_states.detach(), start, end)
        self.length = end
        self.storing = False
        if self.device.type == "cpu" and self.nonfinite:
            say_once("A NaN or infinity reached the quantized KV cache; see cache.routes['nonfinite'].")

    def recover(self) -> None:
        """Forget an append that was interrupted, if everything that later queries read is still there.

        Raises:
            ValueError: it is not.
        """
        if not self.storing:
            return
        for side in (self._keys, self._values):
            if self.length == 0:
                side.recent_start = 0
            if side.recent is not None and side.recent_start > self._states(side).dense_from(self.length):
                raise ValueError(
                    f"layer {self.layer_idx} was interrupted while it stored more than {ROLLBACK} tokens, and may "
                    "have lost exact copies; cache.reset() empties the cache"
                )
        self._forget_sinks()
        self.storing = False

    def _forget_sinks(self) -> None:
        if self.sink_positions.shape[1]:
            self.sink_positions[self.sink_positions >= self.length] = -1
            self.sinks_complete = bool((self.sink_positions >= 0).all())

    def _append_sinks(self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, end: int) -> None:
        """Copy those of the new tokens that are among the first `sink_length` unpadded ones of their row."""
        with torch.inference_mode(False):
            is_token = torch.ones(self.sink_positions.shape[0], end, dtype=torch.bool, device=self.device)
            if self.padding is not None:
                known = min(end, self.padding.shape[1])
                is_token[:, :known] = ~self.padding[:, :known]
            rank = is_token.long().cumsum(1) - 1
            sink_length = self.sink_positions.shape[1]
            row, column = torch.nonzero(is_token & (rank < sink_length), as_tuple=True)
            slot = rank[row, column]
            self.sink_positions[row, slot] = column.int()
            new = column >= start
            row, column, slot = row[new], column[new] - start, slot[new]
            for side, states in ((self._keys, key_states), (self._values, value_states)):
                if side.sink is not None:
                    side.sink[row, :, slot] = states[row, :, column]
            self.sinks_complete = bool((self.sink_positions >= 0).all())

    def _states(self, side: _Side) -> QuantizedStates:
        return QuantizedStates(
            side.spec, side.data, side.scale, side.zero_point, side.recent, side.sink, self.sink_positions,
            self.length, self.kv_config.recent_length, side.head_dim, self.dtype, self.kv_config.backend, self.routes,
        )  # fmt: skip

    def _say_dequantized(self) -> None:
        if self.takes_states is None:
            say_once(
                "This model's attention does not take the cached states as they are, so each step de-quantizes them "
                "(slower, same values)."
            )

    def reserve(self, max_length: int, exact: bool = True) -> None:
        """Make room for `max_length` tokens; not exact: at least half as much again, so that growing is amortised."""
        if not self.is_initialized:
            self.max_length = max(max_length, self.max_length or 0)
            return
        for side in (self._keys, self._values):
            if max_length > side.capacity:
                side.grow(max_length if exact else max(max_length, side.capacity * 3 // 2), self.length)

    def set_padding(self, padding: torch.Tensor) -> None:
        if self.is_initialized:
            if padding.shape[0] != self.sink_positions.shape[0]:
                raise ValueError(
                    f"attention_mask: batch {padding.shape[0]} does not fit the cache's {self.sink_positions.shape[0]}"
                )
            padding = padding.to(self.device)
            stored = padding.new_zeros(padding.shape[0], self.length)
            if self.padding is not None:
                known = min(self.length, self.padding.shape[1])
                stored[:, :known] = self.padding[:, :known]
            padding = torch.cat([stored, padding[:, self.length :]], dim=1)
        with torch.inference_mode(False):
            self.padding = padding.clone() if padding.any() else None

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive argument does what the installed transformers does.

        Up to `ROLLBACK` tokens the cache is as if they had never come; beyond, exact copies that its queries would
        read are replaced by their de-quantized values (`routes["window_lost"]`).
        """
        if not self.is_initialized:
            return
        self.recover()
        probe = DynamicLayer()
        probe.lazy_initialization(torch.empty(0), torch.empty(0))
        probe.keys = probe.values = torch.empty(1, self.length, 1, device="meta")
        probe.crop(tokens_to_remove)
        length = probe.keys.shape[-2]
        if length == self.length:
            return
        self.length = length
        lost = [side.refill(self._states(side)) for side in (self._keys, self._values)]
        if any(lost):
            self.routes["window_lost"] += 1
            say_once(
                f"crop: more than {ROLLBACK} tokens were removed; exact copies were replaced by de-quantized ones."
            )
        self._forget_sinks()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _select(self, select) -> None:
        """Apply `select` along the batch."""
        with torch.inference_mode(False):
            padding = None if self.padding is None else select(self.padding)
            if not self.is_initialized:
                self.padding = padding
                return
            sink_positions = select(self.sink_positions)
            self._transform(select)
            self.padding, self.sink_positions = padding, sink_positions

    def _transform(self, function) -> None:
        """Apply `function` to the storage of both sides, or, if there is no memory for that, to none."""
        with torch.inference_mode(False):
            sides = [(side, side.transformed(function)) for side in (self._keys, self._values)]
        for side, tensors in sides:
            vars(side).update(tensors)

    def reset(self) -> None:
        """Empty the layer; the next update allocates anew, for whatever batch comes."""
        if self.is_initialized:
            self.max_length = self._keys.capacity
        self._keys = self._values = self.padding = None
        self.length = 0
        self.storing = self.is_initialized = False

    def state(self) -> dict:
        """Tensors and plain values from which `restore` makes an equal layer."""
        state = {"length": self.length, "takes_states": self.takes_states, "padding": self.padding}
        if self.length:
            slots = (self.sink_positions >= 0)[:, None, :, None]
            state |= {"dtype": self.dtype, "nonfinite": self.nonfinite, "sink_positions": self.sink_positions}
            state |= {"keys": self._keys.state(self.length, slots), "values": self._values.state(self.length, slots)}
        return state

    def restore(self, state: dict, device: torch.device | str) -> None:
        """Become the layer, on `device`, whose `state` this is; the layer is new."""
        self.takes_states, self.padding = state["takes_states"], state["padding"]
        if not state["length"]:
            return
        sides = (state["keys"], state["values"])
        like = (
            torch.empty(*side["data"].shape[:2], 0, side["head_dim"], dtype=state["dtype"], device=device)
            for side in sides
        )
        self.lazy_initialization(*like)
        for side, saved in zip((self._keys, self._values), sides):
            side.restore(saved, state["length"])
        # Copies, because these are written in place and small.
        self.sink_positions, self.nonfinite = state["sink_positions"].clone(), state["nonfinite"].clone()
        self.sinks_complete = bool((self.sink_positions >= 0).all())
        self.length = state["length"]

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self._transform(lambda x: x.to(device, non_blocking=True))

    def memory_report(self) -> Counter:
        if not self.is_initialized:
            return Counter()
        report = self._keys.memory_report(self.length) + self._values.memory_report(self.length)
        extra = sum(t.nbytes for t in (self.sink_positions, self.padding, self.nonfinite) if t is not None)
        return report + Counter({"dense": extra, "total": extra})


class QuantizedHybridLayer(LinearAttentionAndFullAttentionLayer, QuantizedLayer):
    """A layer with linear and full attention side by side; the linear states stay transformers' own.

    Each method is either one part's, or both parts' in turn.
    """

    _layer_type = None
    update = QuantizedLayer.update
    get_max_length = QuantizedLayer.get_max_length
    batch_repeat_interleave = QuantizedLayer.batch_repeat_interleave
    batch_select_indices = QuantizedLayer.batch_select_indices

    def __init__(self, kv_config: KVQuantConfig, layer_idx: int, routes: Counter, max_length: int | None = None):
        LinearAttentionLayer.__init__(self)
        QuantizedLayer.__init__(self, kv_config, layer_idx, routes, max_length)

    def set_linear_states(self, number_of_states: int) -> None:
        """How many linear states the layer keeps; before it is used."""
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *states: torch.Tensor, **linear_states) -> None:
        if states:
            QuantizedLayer.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **linear_states)

    def state(self) -> dict:
        linear = {name: getattr(self, name) for name in vars(LinearAttentionLayer(self.number_of_states))}
        return QuantizedLayer.state(self) | {"linear": linear}

    def restore(self, state: dict, device: torch.device | str) -> None:
        QuantizedLayer.restore(self, state, device)
        vars(self).update(state["linear"])

    def _both(self, name: str, *args) -> None:
        for part in (LinearAttentionLayer, QuantizedLayer):
            getattr(part, name)(self, *args)

    def offload(self) -> None:
        self._both("offload")

    def prefetch(self) -> None:
        self._both("prefetch")

    def reset(self) -> None:
        self._both("reset")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._both("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._both("crop", tokens_to_remove)

    def memory_report(self) -> Counter:
        nbytes = _storage_nbytes({"conv": self.conv_states, "recurrent": self.recurrent_states})
        return super().memory_report() + Counter(dict.fromkeys(("dense", "total", "dense_equivalent"), nbytes))


class _Side:
    """Storage of keys or of values: the body, and the exact copies that override its columns."""

    _tensors = ("data", "scale", "zero_point", "recent", "sink")

    def __init__(self, spec: QuantSpec, states: torch.Tensor, capacity: int, sink_length: int, recent_length: int):
        batch, num_kv_heads, _, self.head_dim = states.shape
        self.spec = spec
        self.dtype, self.device = states.dtype, states.device
        self.recent_start = 0
        window = max(recent_length, spec.block_length or 0)
        self._ring_length = 0 if spec.is_dense or window == 0 else window + ROLLBACK
        self.sink = None if spec.is_dense or sink_length == 0 else self._empty(batch, num_kv_heads, sink_length)
        vars(self).update(self._allocated(batch, num_kv_heads, capacity))

    def _empty(self, *size: int, head_dim: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        # Never inside inference mode: its tensors could not be written outside of it later.
        with torch.inference_mode(False):
            return torch.empty(*size, head_dim or self.head_dim, dtype=dtype or self.dtype, device=self.device)

    def _allocated(self, batch: int, num_kv_heads: int, capacity: int) -> dict[str, torch.Tensor | None]:
        """Storage for `capacity` columns, by attribute. Whoever runs out of memory here has changed nothing."""
        spec, heads = self.spec, (batch, num_kv_heads)
        scale = zero_point = recent = None
        if spec.is_dense:
            data = self._empty(*heads, capacity)
        else:
            data = self._empty(*heads, capacity, head_dim=spec.row_bytes(self.head_dim), dtype=torch.uint8)
            rows = -(-capacity // spec.block_length) if spec.is_channel else capacity
            scales = {"head_dim": spec.num_scales(self.head_dim), "dtype": torch.float16}
            scale = self._empty(*heads, rows, **scales)
            zero_point = self._empty(*heads, rows, **scales) if spec.has_zero_point else None
        if self._ring_length:
            recent = self._empty(*heads, min(self._ring_length, capacity))
        return {"data": data, "scale": scale, "zero_point": zero_point, "recent": recent}

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """batch, num_kv_heads, head_dim"""
        return (*self.data.shape[:2], self.head_dim)

    def grow(self, capacity: int, length: int) -> None:
        """Move the first `length` columns into larger storage."""
        new = self._allocated(*self.data.shape[:2], capacity)
        new["data"][:, :, :length] = self.data[:, :, :length]
        for name in ("scale", "zero_point"):
            old = getattr(self, name)
            if old is not None:
                new[name][:, :, : old.shape[2]] = old
        if self.recent is not None:
            columns = torch.arange(self.recent_start, length, device=self.device)
            ring, old = new["recent"], self.recent
            ring[:, :, columns % ring.shape[2]] = old[:, :, columns % old.shape[2]]
        vars(self).update(new)

    def make_way(self, end: int) -> None:
        """Columns up to `end` are about to be stored: the ring loses what lies further back than its length."""
        if self.recent is not None:
            self.recent_start = max(self.recent_start, end - self.recent.shape[2])

    def refill(self, states: QuantizedStates) -> bool:
        """After a crop: put de-quantized values where the next query reads the ring, but the ring lost the column."""
        needed = states.dense_from(states.length)
        self.recent_start = min(self.recent_start, states.length)
        if self.recent is None or needed >= self.recent_start:
            return False
        columns = torch.arange(needed, self.recent_start, device=self.device)
        self.recent[:, :, columns % self.recent.shape[2]] = states.body(self.dtype)[:, :, columns]
        self.recent_start = needed
        return True

    def transformed(self, function) -> dict[str, torch.Tensor]:
        """`function` of every tensor, by attribute."""
        tensors = {name: getattr(self, name) for name in self._tensors}
        return {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}

    def state(self, length: int, is_sink: torch.Tensor) -> dict:
        """The first `length` columns as a layer's `state` holds them; what was never written is zero."""
        whole, block = length, 1
        if self.spec.is_channel:
            block = self.spec.block_length
            whole = length - length % block
        state = {
            "head_dim": self.head_dim,
            "data": self.data[:, :, :length].clone(),
            "recent_start": self.recent_start,
        }
        state["data"][:, :, whole:] = 0
        for name in ("scale", "zero_point"):
            tensor = getattr(self, name)
            if tensor is not None:
                state[name] = tensor[:, :, : -(-length // block)].clone()
                state[name][:, :, whole // block :] = 0
        if self.recent is not None:
            columns = torch.arange(self.recent_start, length, device=self.recent.device)
            state["recent"] = self.recent[:, :, columns % self.recent.shape[2]]
        if self.sink is not None:
            state["sink"] = torch.where(is_sink.to(self.sink.device), self.sink, 0)
        return state

    def restore(self, state: dict, length: int) -> None:
        """Take over a `state` as it is; only the ring is laid out anew, since its slots depend on the capacity."""
        self.data, self.recent_start = state["data"], state["recent_start"]
        self.scale, self.zero_point = state.get("scale"), state.get("zero_point")
        if "sink" in state:
            self.sink = state["sink"].clone()
        if self._ring_length:
            self.recent = self._empty(*self.data.shape[:2], min(self._ring_length, length))
            columns = torch.arange(self.recent_start, length, device=self.device)
            self.recent[:, :, columns % self.recent.shape[2]] = state["recent"]

    def memory_report(self, length: int) -> Counter:
        batch, num_kv_heads, _ = self.shape
        dense = sum(t.nbytes for t in (self.recent, self.sink) if t is not None)
        body = sum(t.nbytes for t in (self.data, self.scale, self.zero_point) if t is not None)
        heads = batch * num_kv_heads
        rows = length // self.spec.block_length if self.spec.is_channel else length
        columns = rows * self.spec.block_length if self.spec.is_channel else length
        codes = heads * columns * self.data.shape[-1] * self.data.element_size()
        scales = sum(
            heads * rows * t.shape[-1] * t.element_size() for t in (self.scale, self.zero_point) if t is not None
        )
        equivalent = heads * length * self.head_dim * self.dtype.itemsize
        if self.spec.is_dense:
            dense, codes, body = dense + codes, 0, body - codes
        report = {"codes": codes, "scales": scales, "dense": dense, "slack": body - codes - scales}
        return Counter(report | {"total": sum(report.values()), "dense_equivalent": equivalent})


def _storage_nbytes(attributes: dict) -> int:
    """Bytes of the distinct storages behind the tensors in a layer's attributes, and in their lists and dicts."""
    storages, pending = {}, list(attributes.values())
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (dict, list, tuple)):
            pending.extend(value.values() if isinstance(value, dict) else value)
    return sum(storages.values())


class _Fresh(torch.Tensor):
    """States that a layer has just returned; they know what they are, and whether anything but attention used them."""

    # What `QuantizedStates` can do too.
    _shared = frozenset(
        {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")}
        | {torch.Tensor.size, torch.Tensor.to}
    )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in cls._shared:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, cls):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _tagged(states: torch.Tensor, layer: QuantizedLayer) -> torch.Tensor:
    """A fresh view that remembers its layer; see `learn_route`."""
    view = states.view_as(states)
    if not torch.compiler.is_compiling():
        view = view.as_subclass(_Fresh)
        view.used = False
    view.plain = states
    setattr(view, _TAG, weakref.ref(layer))
    return view


def learn_route(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Called by attention with its key and value: if they are the very objects that a layer returned from its first
    update, and nothing else has used them (a mask made of values, say), nothing stands between cache and attention,
    and the layer may return `QuantizedStates` from now on. Returns both as plain tensors."""
    layers = [tag() for tag in (getattr(key, _TAG, None), getattr(value, _TAG, None)) if tag is not None]
    used = getattr(key, "used", False) or getattr(value, "used", False)
    same_layer = len(layers) == 2 and layers[0] is layers[1] and layers[0] is not None
    if same_layer and not used and layers[0].takes_states is None:
        layers[0].takes_states = True
    return getattr(key, "plain", key), getattr(value, "plain", value)


_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
