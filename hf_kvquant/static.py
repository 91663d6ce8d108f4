"""`StaticQuantizedLayer`: a quantized layer in storage of a fixed size, for torch.compile and CUDA graphs.

    cache = QuantizedCache(config=model.config, kv_config="int8-static", max_length=4096)

Outside of compiled steps it is a `QuantizedLayer` that does not grow: same bytes, same routes, same results. Inside,
nothing is read from the device, which would wait, and no Python number changes, which would compile anew. The length,
the routes and the tokens without room are counted in small tensors, and attention gets all columns of the storage with
the length beside them. So a call sees more storage, but a query reads the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from .config import KVQuantConfig
from .layers import QuantizedLayer
from .route import ROUTES, Routes
from .states import QuantizedStates, is_captured
from .storage import Side

_FUSED = "decode_fused"


def is_traced() -> bool:
    """Whether operations are now recorded, to be repeated on other tensors: nothing may depend on their values."""
    return torch.compiler.is_compiling() or is_captured()


def keep_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Mark tensors that steps write in place: a CUDA graph always writes to the addresses that it recorded."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


class DeviceRoutes:
    """The routes of one layer, counted on its device.

    A captured step launches no kernel for it: the append counts its states as fused (`appends`, of
    `ops.quantize_append`), which only another route corrects.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(len(ROUTES), dtype=torch.int64, device=device)
        self.appends = torch.zeros(2, dtype=torch.int64, device=device)
        # Whether the route of the last append has been counted, as fused.
        self._is_counted = False

    def counted_appends(self) -> torch.Tensor:
        """The counter for an append. `count` is called for its states, or for those of the last one of an update."""
        if self._is_counted:
            self.counts[ROUTES.index(_FUSED)] -= 1
        self._is_counted = True
        return self.appends

    def count(self, route: str) -> None:
        is_counted, self._is_counted = self._is_counted, False
        if is_counted and route == _FUSED:
            return
        self.counts[ROUTES.index(route)] += 1
        if is_counted:
            self.counts[ROUTES.index(_FUSED)] -= 1

    def known(self) -> Counter:
        """The counts as integers; waits for the device."""
        found = Counter(dict(zip(ROUTES, self.counts.tolist())))
        found[_FUSED] += int(self.appends[1]) - self._is_counted
        return found


class StaticQuantizedLayer(QuantizedLayer):
    """A `QuantizedLayer` with room for exactly `max_length` tokens."""

    is_compileable = True
    # `Routes`, or `DeviceRoutes` once the device is known.
    routes: Any
    _length: int | None

    def __init__(self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int):
        self.device_length: torch.Tensor | None = None
        # Set by the cache: if another layer returns all of its storage, as transformers' own do, this one does too.
        self.is_beside_dense = False
        super().__init__(kv_config, layer_idx, routes, max_length)

    @property
    def length(self) -> int:
        """The number of stored tokens. After a compiled step only the device knows it, and this waits for the device.

        Raises:
            ValueError: a compiled step found no room for its tokens.
        """
        if self._length is None:
            dropped = int(self.faults[1])
            if dropped:
                raise ValueError(
                    f"max_length: {self.max_length} tokens have no room for {dropped} that compiled steps added to "
                    f"layer {self.layer_idx}, and that are lost; cache.reset() empties the cache"
                )
            self._length = int(self.device_length)
            self._learn_steps()
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        self._length = length
        # A Python bool, because a compiled step may depend on one that never changes.
        self._is_filled = length > 0
        if self.device_length is not None:
            self.device_length.fill_(length)

    def _learn_steps(self) -> None:
        """Note what compiled steps have done, once the number of tokens is known."""
        self._make_way(0)

    def _device_tokens(self) -> torch.Tensor:
        """`tokens`, as the device knows it."""
        return self.device_length

    @property
    def is_filled(self) -> bool:
        return self._is_filled

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        with torch.inference_mode(False):
            self.device_length = torch.zeros((), dtype=torch.int64, device=self.device)
            if not isinstance(self.routes, DeviceRoutes):
                self.routes = DeviceRoutes(self.device)
            self.padding = self._whole_padding(self.padding)
        keep_in_place(self._tensors())

    def _whole_padding(self, padding: torch.Tensor | None) -> torch.Tensor:
        """Padding for every column of the storage, so that its shape says nothing about the prompt."""
        whole = torch.zeros(self.sink_positions.shape[0], self.max_length, dtype=torch.bool, device=self.device)
        if padding is not None:
            known = min(padding.shape[1], self.max_length)
            whole[:, :known] = padding[:, :known]
        return whole

    def _small_tensors(self) -> list[torch.Tensor | None]:
        return [*super()._small_tensors(), self.device_length, self.routes.counts, self.routes.appends]

    def _tensors(self) -> list[torch.Tensor]:
        """All tensors that steps read, or write in place."""
        stored = [t for side in (self._keys, self._values) for t in side.stored if t is not None]
        return [*stored, *self._small_tensors(), *(t for t in self.factors or () if t is not None)]

    def _admitted(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states, after checking them and the room for them.

        Raises:
            ValueError: there is no room; nothing was stored. A compiled step does not store them either, and the next
                call outside of compiled steps raises.
        """
        if not is_traced():
            self._check_room(self.tokens + key_states.shape[2])
        return super()._admitted(key_states, value_states)

    def _is_whole(self) -> bool:
        """Whether attention gets all columns of the storage: in a compiled step, or if its mask has them all."""
        return is_traced() or self.is_beside_dense or (self.is_filled and not self.takes_states)

    def _views(self, n: int = 0) -> tuple[QuantizedStates, QuantizedStates]:
        return self._whole_states() if self._is_whole() else super()._views(n)

    def _make_room(self, n: int) -> None:
        """Do nothing: `_admitted` has checked the room."""

    def _make_way(self, n: int) -> None:
        if not is_traced():
            super()._make_way(n)

    def _appends(self) -> torch.Tensor | None:
        return self.routes.counted_appends() if self._is_whole() else None

    def _advance(self, n: int) -> None:
        if not self._is_whole():  # else the append has raised it
            self.device_length += n
        self._length = None if is_traced() else self._length + n
        self._is_filled = True

    def _say_nonfinite(self) -> None:
        if not is_traced():
            super()._say_nonfinite()

    def _say_dequantized(self) -> None:
        if not is_traced():
            super()._say_dequantized()

    def _first(self, states: torch.Tensor) -> torch.Tensor:
        if self.is_beside_dense:
            states = torch.nn.functional.pad(states, (0, 0, 0, self.max_length - states.shape[2]))
        return states

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._is_whole():
            return self._with_newest(past, new)
        joined = super()._joined(past, new)
        # The mask covers all of the storage; `QuantizedStates` have this attribute already.
        joined.capacity = self.max_length  # type: ignore[attr-defined]
        return joined

    def _next_read(self, side: Side) -> torch.Tensor | None:
        """The states that the next query reads; in a compiled step they cover all of the storage."""
        if not is_traced():
            return super()._next_read(side)
        if not (self.is_initialized and self.is_filled):
            return None
        keys, values = self._whole_states()
        return (keys if side is self._keys else values).read(0)

    def _with_newest(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`states` `[batch, num_kv_heads, max_length, head_dim]` with its last columns replaced by `new`."""
        n = new.shape[2]
        index = torch.arange(self.max_length, device=self.device) - (self._device_tokens() - n)
        is_new = (index >= 0) & (index < n)
        return torch.where(is_new[:, None], new[:, :, index.clamp(0, n - 1)], states)

    def _whole_states(self) -> tuple[QuantizedStates, QuantizedStates]:
        """Keys and values with all columns of the storage, and the length beside them."""
        keys, values = (self._states(x, x.capacity, self.device_length) for x in (self._keys, self._values))
        return keys, values

    def _check_room(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"max_length: {self.max_length} tokens have no room for {length}; a static cache is fixed"
            )

    def reserve(self, max_length: int, exact: bool = True) -> None:
        self._check_room(max_length)

    def set_padding(self, padding: torch.Tensor, of_last: bool = False) -> None:
        kept = self.padding
        super().set_padding(padding, of_last)
        if self.is_initialized:
            self.padding = kept.copy_(self._whole_padding(self.padding))

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """The number of tokens; a tensor if an integer would have to wait for the device, as in a `StaticLayer`."""
        if not self.is_initialized or not self.is_filled:
            return 0
        return self._device_tokens() if is_traced() or self._length is None else self.tokens

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is as wide as the first states, which are returned as they are, and later as all of the storage."""
        return (self.max_length if self.is_filled or self.is_beside_dense else query_length), 0

    def _placed(self, old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor that keeps its shape also keeps its address."""
        if new is not None and new.shape == old.shape and new.device == old.device:
            return old.copy_(new)
        keep_in_place([] if new is None else [new])
        return new

    def recover(self) -> None:
        if self.storing:
            super().recover()
            # The interruption may have come between the updates of the two lengths.
            self.device_length.fill_(self.length)

    def reset(self) -> None:
        max_length = self.max_length
        super().reset()
        self.max_length = max_length

    def restore(self, state: dict, device: torch.device | str) -> None:
        self._check_room(state["length"] + state.get("dropped", 0))
        super().restore(state, device)
        if self.is_initialized:
            self.padding = self._whole_padding(state["padding"])
            for side in (self._keys, self._values):
                side.grow(self._first_capacity(0), self.length)
            # A compiled step cannot read the file. If it is missing, the next append says so.
            with suppress(ValueError):
                self._feedback()
            keep_in_place(self._tensors())
