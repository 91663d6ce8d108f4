"""`QuantizedLayer`: one layer's keys and values, stored quantized; `update` decides how attention reads them.

The type of the return value is the route: a tensor means dense attention, `QuantizedStates` the fused operator. The
first update returns the states that it was given (prefill is exact). A later one of at most `ops.MAX_Q_LEN` tokens
returns `QuantizedStates` if the model takes them, and `RecordedStates` if it has attention code of its own. A longer
one returns the de-quantized past and the new states.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import ops
from .config import KVQuantConfig
from .expected import COUNT, Bounds, meta
from .feedback import Factors, factors_in
from .grammar import recorded
from .host import DynamicLayer, records_attention_weights
from .lazy import LazyStates
from .route import KEEPS_WEIGHTS, Routes, attention_is_switched, say_dequantized, say_once, tagged
from .states import QuantizedStates, Stored, autocast, is_autocast, is_captured, mask_length
from .storage import ROLLBACK, Side, to_device, to_host

STATES_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FIRST_CAPACITY = 256


class QuantizedLayer(DynamicLayer):
    """A `DynamicLayer` that stores the keys and the values of one layer quantized, each in a `Side`."""

    # The layer's, where it has one; see `sliding`.
    sliding_window: int | None = None

    def __init__(self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int | None = None):
        super().__init__()
        self._keys: Side | None = None
        self._values: Side | None = None
        self.kv_config = kv_config
        self.layer_idx = layer_idx
        self.routes = self.shared_routes = routes
        self.max_length = max_length
        self.takes_states: bool | None = None
        self.was_offered = False
        self.padding: torch.Tensor | None = None
        self.padding_is_of_last = False
        self.length = 0
        # The error feedback, which a restored layer reads at its first append.
        self.factors: Factors | None = None
        # True while an append writes; if it is still True afterwards, the append was interrupted.
        self.storing = False
        # Whether both sides are in the main memory; see `offloading`.
        self.is_offloaded = False

    # `DynamicLayer` keeps its states in these two attributes; here they return de-quantized copies.
    @property
    def keys(self) -> torch.Tensor | None:
        return self._next_read(self._keys)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        assert value is None, "the states of a quantized layer are written by update()"

    @property
    def values(self) -> torch.Tensor | None:
        return self._next_read(self._values)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        assert value is None, "the states of a quantized layer are written by update()"

    @property
    def is_filled(self) -> bool:
        return self.length > 0

    def _next_read(self, side: Side) -> torch.Tensor | None:
        """The states that the next query reads. (The last query may read exact copies that a long crop has lost.)"""
        if not (self.is_initialized and self.is_filled):
            return None
        states = self._states(side)
        if not self.shared_routes.in_call or torch.compiler.is_compiling():
            return self._on_device(states).read(0)

        def read() -> torch.Tensor:
            self.routes.count("decode_dequantized")
            return self._on_device(states).read(0)

        shape = (*states.shape[:2], mask_length(states.length, self.sliding_window, 0), states.head_dim)
        return LazyStates(torch.Size(shape), self.dtype, self.device, read)

    def _on_device(self, states: QuantizedStates) -> QuantizedStates:
        if not self.is_offloaded:
            return states
        return replace(states, stored=states.stored.transformed(partial(to_device, device=self.device)))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = key_states.shape[0]
        if self.padding is not None and self.padding.shape[0] != batch:
            raise ValueError(f"attention_mask: batch {self.padding.shape[0]} does not fit the states' batch {batch}")
        self.check_formats(self.device, self.dtype, (key_states.shape[-1], value_states.shape[-1]))
        capacity, config = self._first_capacity(key_states.shape[2]), self.kv_config
        sides = []
        for name, spec, states in zip(
            ("keys", "values"), config.for_layer(self.layer_idx), (key_states, value_states)
        ):
            try:
                spec = spec.resolve(states.shape[-1])
            except ValueError as error:
                raise ValueError(f"layer {self.layer_idx}: {name}.{error}") from None
            sides.append(Side(spec, states, capacity, config.sink_length, config.recent_length))
        self._keys, self._values = sides
        with torch.inference_mode(False):
            self.padding = None if self.padding is None else self.padding.to(self.device)
            self.faults = torch.zeros(2, dtype=torch.int64, device=self.device)
            self.sink_positions = torch.full((batch, config.sink_length), -1, dtype=torch.int32, device=self.device)
        if key_states.shape[2]:
            self._feedback()
        self.is_initialized = True

    def check_formats(self, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> None:
        """Check that states like these can be stored in the layer's formats; see `ops.check_formats`."""
        config = self.kv_config
        try:
            ops.check_formats(*config.for_layer(self.layer_idx), config.backend, device, dtype, head_dims)
        except ValueError as error:
            raise ValueError(f"layer {self.layer_idx}: {error}") from None

    def _first_capacity(self, n: int) -> int:
        """Columns of the storage that `n` tokens allocate."""
        capacity = self.max_length or 0
        return capacity if capacity >= n else max(_FIRST_CAPACITY, n)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Store new tokens `[batch, num_kv_heads, n, head_dim]` and return the states for attention (the route)."""
        key_states, value_states = self._admitted(key_states, value_states)
        n, is_first = key_states.shape[2], not self.is_filled
        is_long = n > ops.MAX_Q_LEN and not is_first
        past = [self._past(states) for states in self._views()] if is_long else []
        views = self._append(key_states, value_states)
        if is_first:
            self.routes.count("prefill_dense")
            return self._offered(self._first(key_states), self._first(value_states), first=True)
        if not is_long and self.takes_states:
            return views
        if not is_long and self._records():
            keys, values, step = recorded(*views, n, self)
            self.shared_routes.steps.append(step)
            return keys, values
        self.routes.count("decode_dequantized")
        if is_long:
            return self._offered(*map(self._joined, past, (key_states, value_states)))
        self._say_dequantized()
        return self._offered(*(states.read(n) for states in views))

    def _admitted(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states, checked and in the dtype of attention. The first ones allocate the storage."""
        if is_autocast(key_states):
            key_states, value_states = autocast(key_states), autocast(value_states)
            if self.is_initialized:
                # The layer may have been filled without autocast.
                key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        if not self.is_filled:
            self._align_padding(key_states.shape[2])
        if not self.is_initialized:
            self._check_new(key_states, value_states)
            if key_states.device.type == "meta":
                raise ValueError("key_states: device meta has no elements to quantize; expected another device")
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        return key_states, value_states

    def _align_padding(self, n: int) -> None:
        """Extend a mask of the last columns to all `n` columns of the first update (`QuantizedCache.set_padding`)."""
        if self.padding is not None and self.padding_is_of_last and self.padding.shape[1] < n:
            self.padding = torch.nn.functional.pad(self.padding, (n - self.padding.shape[1], 0))

    def _records(self) -> bool:
        """Whether the model's code gets tensors that note what it does with them."""
        is_possible = self.shared_routes.in_call and attention_is_switched() and self.takes_states is None
        return is_possible and not (torch.compiler.is_compiling() or is_captured() or self._keeps_weights())

    def _keeps_weights(self) -> bool:
        """Whether the model that runs returns attention weights, which it has to compute itself."""
        return self.shared_routes.keeps_weights or records_attention_weights()

    def _views(self, n: int = 0) -> tuple[QuantizedStates, QuantizedStates]:
        """Keys and values as attention reads them, once `n` more tokens are stored."""
        length = self.length + n
        return self._states(self._keys, length), self._states(self._values, length)

    def _first(self, states: torch.Tensor) -> torch.Tensor:
        """The tensor that attention gets for the first states."""
        return states

    def _past(self, states: QuantizedStates) -> torch.Tensor:
        """What attention gets of the past of many new tokens, de-quantized."""
        return states.read(0)

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The tensor that attention gets for the de-quantized past and many new states."""
        return torch.cat([past, new], dim=2)

    def _offered(self, *states: torch.Tensor, first: bool = False) -> tuple[torch.Tensor, ...]:
        """Dense keys and values, tagged so that attention can learn the layer's route (see `route`): the first
        ones and, if attention was not ours then, the first ones once it is."""
        is_ours = attention_is_switched()
        if self.takes_states is not None or self.was_offered or not (first or is_ours):
            return states
        self.was_offered = is_ours
        return tuple(tagged(x, self) for x in states)

    def _check_new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check the first states of a layer; `_check` compares later ones with them."""
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
        dtype, device = self.dtype, self.device
        for name, states, side in (
            ("key_states", key_states, self._keys),
            ("value_states", value_states, self._values),
        ):
            batch, heads, _, head_dim = states.shape
            if (batch, heads, head_dim) != side.shape or states.dtype != dtype:
                raise ValueError(
                    f"{name}: {tuple(states.shape)} of {states.dtype} does not fit layer {self.layer_idx}; expected "
                    f"batch, num_kv_heads and head_dim {side.shape} of {self.dtype}"
                )
            if states.device != device:
                raise ValueError(
                    f"{name}: device {states.device} does not fit layer {self.layer_idx}; expected {self.device}"
                )
        if key_states.shape[2] != value_states.shape[2]:
            raise ValueError(
                f"value_states: {value_states.shape[2]} tokens do not fit the keys; expected {key_states.shape[2]}"
            )

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[QuantizedStates, QuantizedStates]:
        """Store the tokens; returns keys and values as attention reads them afterwards."""
        n, factors = key_states.shape[2], self._feedback()
        self._make_room(n)
        keys, values = self._views(n)
        self.storing = True
        # Before the ring is written, so that after an interruption it does not claim columns that it lost.
        self._make_way(n)
        start = self.length if keys.device_length is None else 0
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        padding = self._padding_of_columns()
        ops.quantize_append(
            key_states, value_states, keys, values, self.faults, padding, start=start, appends=self._appends(),
            factors=factors,
        )  # fmt: skip
        self._advance(n)
        self.storing = False
        self._say_nonfinite()
        return keys, values

    def _feedback(self) -> Factors:
        """The error feedback of keys and of values.

        Raises:
            ValueError: its file cannot be read, or is not that of this model.
        """
        if self.factors is None:
            path, sides = self.kv_config.error_feedback, (self._keys, self._values)
            specs, shapes = (self._keys.spec, self._values.spec), tuple(side.shape[1:] for side in sides)
            self.factors = factors_in(path, self.layer_idx, specs, shapes, self.device)
        return self.factors

    def _appends(self) -> torch.Tensor | None:
        """The counter of appends, if the device counts this one."""
        return None

    def _padding_of_columns(self) -> torch.Tensor | None:
        """Which columns of the storage are padding."""
        return self.padding

    def _make_room(self, n: int) -> None:
        """Make room for `n` more tokens in the storage."""
        self.reserve(self.length + n, exact=False)

    def _make_way(self, n: int) -> None:
        """Note that `n` more tokens are about to be stored, for which the rings lose their oldest ones."""
        for side in (self._keys, self._values):
            if side.stored.recent is not None:
                side.make_way(self.length + n)

    def _advance(self, n: int) -> None:
        """Note that `n` tokens have been stored."""
        self.length += n

    def _say_nonfinite(self) -> None:
        # Read at its address, because indexing a tensor takes longer than writing a token.
        if self.device.type == "cpu" and ctypes.c_int64.from_address(self.faults.data_ptr()).value:
            say_once("A NaN or infinity reached the quantized KV cache; see cache.routes['nonfinite'].")

    def recover(self) -> None:
        """Forget an append that was interrupted, if everything that later queries read is still there.

        Raises:
            ValueError: exact copies that later queries read may be lost.
        """
        if not self.storing:
            return
        if self._has_lost():
            raise ValueError(
                f"layer {self.layer_idx} was interrupted while it stored more than {ROLLBACK} tokens, and may "
                "have lost exact copies; cache.reset() empties the cache"
            )
        self._forget_sinks()
        self.storing = False

    def _has_lost(self) -> bool:
        """Whether the append that was interrupted has taken what later queries read."""
        for side in (self._keys, self._values):
            if self.length == 0:
                side.recent_start = 0
            if side.recent is not None and side.recent_start > self._states(side).dense_from(self.length):
                return True
        return False

    def _forget_sinks(self) -> None:
        if self.sink_positions.shape[1]:
            self.sink_positions[self.sink_positions >= self.length] = -1

    def _states(
        self, side: Side, length: int | None = None, device_length: torch.Tensor | None = None, **place: Any
    ) -> QuantizedStates:
        """States of all columns so far, or of those below `length`, the first `device_length` of which are in use."""
        config = self.kv_config
        return QuantizedStates.of(
            spec=side.spec, stored=side.stored, sink_positions=self.sink_positions,
            length=self.length if length is None else length, recent_length=config.recent_length,
            head_dim=side.head_dim, dtype=self.dtype, backend=config.backend, routes=self.routes,
            device_length=device_length, sliding_window=self.sliding_window, **place,
        )  # fmt: skip

    def _say_dequantized(self) -> None:
        """Warn that a step reads de-quantized states, and why, unless attention can learn from it not to."""
        if self.takes_states is not None:
            return
        if attention_is_switched():
            if self._keeps_weights():
                say_dequantized(KEEPS_WEIGHTS)
            elif self.was_offered:
                say_once(
                    "This model's attention does not take the cached states as they are, so each step de-quantizes "
                    "them (slower, same values)."
                )
        else:
            say_once(
                "A quantized KV cache is used outside of hf_kvquant.attention(model), so each step de-quantizes it "
                "(slower, same values); call the model inside of `with hf_kvquant.attention(model):`."
            )

    def reserve(self, max_length: int, exact: bool = True) -> None:
        """Make room for `max_length` tokens. If not `exact`, grow by at least half, so that the cost is amortised."""
        if not self.is_initialized:
            self.max_length = max(max_length, self.max_length or 0)
            return
        for side in (self._keys, self._values):
            if max_length > side.stored.data.size(2):
                side.grow(max_length if exact else self._grown(side.capacity, max_length), self.length)

    def _grown(self, capacity: int, needed: int) -> int:
        return max(needed, capacity * 3 // 2)

    def set_padding(self, padding: torch.Tensor, of_last: bool = False) -> None:
        self.padding_is_of_last = of_last
        if self.is_initialized:
            if padding.shape[0] != self.sink_positions.shape[0]:
                raise ValueError(
                    f"attention_mask: batch {padding.shape[0]} does not fit the cache's {self.sink_positions.shape[0]}"
                )
            padding = padding.to(self.device)
            stored = padding.new_zeros(padding.shape[0], self.tokens)
            if self.padding is not None:
                known = min(self.tokens, self.padding.shape[1])
                stored[:, :known] = self.padding[:, :known]
            padding = torch.cat([stored, padding[:, self.tokens :]], dim=1)
        with torch.inference_mode(False):
            self.padding = padding.clone() if padding.any() else None

    @property
    def tokens(self) -> int:
        """How many tokens the layer has taken and not forgotten in a crop."""
        return self.length

    def get_seq_length(self) -> int:
        return self.tokens

    def tokens_after(self, tokens_to_remove: int) -> int:
        """How many tokens a `crop` would leave."""
        probe = DynamicLayer()
        probe.lazy_initialization(torch.empty(0), torch.empty(0))
        probe.keys = probe.values = torch.empty(1, self.tokens, 1, device="meta")
        probe.crop(tokens_to_remove)
        return probe.keys.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive argument does what the installed transformers does.

        After a crop of up to `ROLLBACK` tokens the cache is as if they had never come. After a longer one, some exact
        copies that queries would read are replaced by de-quantized values (`routes["window_lost"]`).
        """
        if not self.is_initialized:
            return
        self.recover()
        removed = self.tokens - self.tokens_after(tokens_to_remove)
        if removed == 0:
            return
        self._go_back(removed)
        lost = [side.refill(self._states(side)) for side in (self._keys, self._values)]
        if any(lost):
            self.routes.count("window_lost")
            say_once(
                f"crop: more than {ROLLBACK} tokens were removed; exact copies were replaced by de-quantized ones."
            )
        self._forget_sinks()

    def _go_back(self, removed: int) -> None:
        self.length -= removed

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _select(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `select` along the batch."""
        with torch.inference_mode(False):
            padding = None if self.padding is None else select(self.padding)
            if not self.is_initialized:
                self.padding = padding
                return
            sink_positions = select(self.sink_positions)
            self._transform(select)
            self.padding = self._placed(self.padding, padding)
            self.sink_positions = self._placed(self.sink_positions, sink_positions)

    def _transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `function` to the storage of both sides, or to neither if memory runs out."""
        with torch.inference_mode(False):
            sides = [(side, side.stored.transformed(function)) for side in (self._keys, self._values)]
        for side, new in sides:
            side.stored = Stored(*map(self._placed, side.stored, new))

    def _placed(self, old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor that replaces `old`, with the elements of `new`."""
        return new

    def reset(self) -> None:
        """Empty the layer; the next update allocates anew, for a batch of any size."""
        if self.is_initialized:
            self.max_length = self._keys.capacity
        self._keys = self._values = self.padding = self.factors = None
        self.length = 0
        self.storing = self.is_initialized = self.is_offloaded = False

    def state(self) -> dict:
        """Tensors and plain values from which `restore` makes an equal layer."""
        state = {"length": self.length, "takes_states": self.takes_states, "padding": self.padding}
        if self.length:
            slots = (self.sink_positions >= 0)[:, None, :, None]
            state |= {"dtype": self.dtype, "faults": self.faults, "sink_positions": self.sink_positions}
            state |= {"keys": self._keys.state(self.length, slots), "values": self._values.state(self.length, slots)}
        return state

    def restore(self, state: dict, device: torch.device | str) -> None:
        """Turn this new layer into the one whose `state` this is, on `device`."""
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
        # Copies, because these tensors are small, and written in place.
        self.sink_positions, self.faults = state["sink_positions"].clone(), state["faults"].clone()
        self.length = state["length"]

    def expected(self, state: dict) -> dict:
        """The pattern (see `expected.py`) for a `state` that `restore` may take; its tensors determine the sizes."""
        length, padding = state["length"], state["padding"]
        pattern = {"length": COUNT, "takes_states": frozenset({None, False, True}), "padding": None}
        if padding is not None:
            batch = state["keys"]["data"].shape[0] if length else padding.shape[0]
            pattern["padding"] = meta(batch, padding.shape[1], dtype=torch.bool)
        if not length:
            return pattern
        saved = {name: state[name] for name in ("keys", "values")}
        if not all(side["data"].numel() for side in saved.values()):
            raise ValueError("no layer holds tokens without elements")
        like = [meta(*side["data"].shape[:2], 0, side["head_dim"], dtype=state["dtype"]) for side in saved.values()]
        self._check_new(*like)
        fresh = QuantizedLayer(self.kv_config, self.layer_idx, Routes(), max_length=length)
        fresh.lazy_initialization(*like)
        fresh.length = length
        last = torch.full(fresh.sink_positions.shape, length - 1, dtype=torch.int32)
        most = torch.tensor([torch.iinfo(torch.int64).max, 0])
        return pattern | {
            "dtype": state["dtype"],
            "faults": Bounds(torch.zeros_like(most), most),
            "sink_positions": Bounds(torch.full_like(last, -1), last, fills=True),
            "keys": fresh._keys.expected(fresh._states(fresh._keys), saved["keys"]["recent_start"]),
            "values": fresh._values.expected(fresh._states(fresh._values), saved["values"]["recent_start"]),
        }

    def offload(self) -> None:
        """Move the stored keys and values to the main memory; states that were returned stay where they are."""
        if self.is_initialized and not self.is_offloaded:
            self._transform(to_host)
            self.is_offloaded = True

    def prefetch(self) -> None:
        """Undo `offload`."""
        if self.is_offloaded:
            self._transform(partial(to_device, device=self.device))
            self.is_offloaded = False

    def memory_report(self) -> Counter:
        if not self.is_initialized:
            return Counter()
        report = self._keys.memory_report(self.length) + self._values.memory_report(self.length)
        report["offloaded"] = report["total"] if self.is_offloaded else 0
        extra = sum(t.nbytes for t in self._small_tensors() if t is not None)
        factors = sum(t.nbytes for t in self.factors or () if t is not None)
        return report + Counter({"dense": extra, "total": extra, "factors": factors})

    def _small_tensors(self) -> list[torch.Tensor | None]:
        """The tensors that are kept beside the sides."""
        return [self.sink_positions, self.padding, self.faults]
