"""`StaticSlidingQuantizedLayer`: a sliding layer in storage of a fixed size, for torch.compile and CUDA graphs.

Its storage is that of the growing sliding layer at its largest, and so it is bounded by the window, not by
`max_length`. Outside of compiled steps it retires the same columns at the same tokens. A compiled step cannot see
whether there is room, so in it the operator `retire` looks: on a CPU it moves columns once in at least 64 tokens, on a
GPU, where nothing may be read back, it copies the storage onto itself in every step.

The mask has the columns of all `max_length` tokens, as in the full layers of a static cache, and attention takes those
that are stored: the first of them is `dropped` tokens from the beginning, a number that only the device knows.
"""

from __future__ import annotations

from typing import Any

import torch

from . import ops, static
from .config import KVQuantConfig
from .expected import COUNT
from .route import Routes
from .sliding import SlidingQuantizedLayer
from .states import QuantizedStates
from .static import StaticQuantizedLayer
from .storage import Side


class StaticSlidingQuantizedLayer(SlidingQuantizedLayer, StaticQuantizedLayer):
    """A `SlidingQuantizedLayer` whose cache has room for exactly `max_length` tokens."""

    get_mask_sizes = StaticQuantizedLayer.get_mask_sizes
    get_max_length = StaticQuantizedLayer.get_max_length
    reserve = StaticQuantizedLayer.reserve

    def __init__(self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int, sliding_window: int):
        self.device_dropped: torch.Tensor | None = None
        # Storage is moved in place: what an interruption leaves of it is useless.
        self._is_moving = False
        super().__init__(kv_config, layer_idx, routes, max_length, sliding_window)

    @property
    def dropped(self) -> int:
        """The number of tokens before the first stored column; like `length`, it may wait for the device."""
        if self._length is None:
            assert self.length is not None
        return self._dropped

    @dropped.setter
    def dropped(self, dropped: int) -> None:
        self._dropped = dropped
        if self.device_dropped is not None:
            self.device_dropped.fill_(dropped)

    def _records(self) -> bool:
        """A model's own attention code has a mask for every token, and the first stored column is a tensor."""
        return False

    def _keeps_past(self) -> bool:
        # Storage of a fixed size keeps what a crop of `ROLLBACK` tokens needs, and no more.
        return False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        with torch.inference_mode(False):
            self.device_dropped = torch.zeros((), dtype=torch.int64, device=key_states.device)
        super().lazy_initialization(key_states, value_states)

    def _small_tensors(self) -> list[torch.Tensor | None]:
        return [*super()._small_tensors(), self.device_dropped]

    def _learn_steps(self) -> None:
        dropped = int(self.device_dropped)
        for side in (self._keys, self._values):
            side.recent_start = max(side.recent_start - (dropped - self._dropped), 0)
        self._dropped = dropped
        super()._learn_steps()

    def _device_tokens(self) -> torch.Tensor:
        return self.device_length + self.device_dropped

    def _states(
        self, side: Side, length: int | None = None, device_length: torch.Tensor | None = None, **place: Any
    ) -> QuantizedStates:
        dropped = self.dropped if device_length is None else self.device_dropped
        return super()._states(side, length, device_length, mask_width=self.max_length, dropped=dropped, **place)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[QuantizedStates, QuantizedStates]:
        if not static.is_traced():
            return super()._append(key_states, value_states)
        if self._keys.capacity == self.max_length:
            # Storage for all tokens never needs space.
            return StaticQuantizedLayer._append(self, key_states, value_states)
        for keys, values in zip(*(x.split(self._piece, dim=2) for x in (key_states, value_states))):
            self._make_space(keys.shape[2])
            views = StaticQuantizedLayer._append(self, keys, values)
        self.faults[1] += (self._device_tokens() > self.max_length) * key_states.shape[2]
        return views

    def _make_space(self, n: int) -> None:
        """Retire columns in the storage if `n` tokens have no room, as far as the device knows it."""
        ops.retire(
            self._keys.stored, self._values.stored, self.sink_positions, self.device_length, self.device_dropped,
            block_length=self._block, n=n, kept=self._kept,
        )  # fmt: skip

    def _retire(self, end: int) -> None:
        gone = self._gone(end)
        if not gone:
            return
        self.storing = self._is_moving = True
        self._make_space(end - self.length)
        for side in (self._keys, self._values):
            side.recent_start = max(side.recent_start - gone, 0)
        self.length, self.dropped = self.length - gone, self.dropped + gone
        self._is_moving = False

    def _has_lost(self) -> bool:
        return self._is_moving or super()._has_lost()

    def _padding_of_columns(self) -> torch.Tensor | None:
        columns = torch.arange(self._keys.capacity, device=self.device) + self.device_dropped
        return self.padding.index_select(1, columns.clamp(max=self.max_length - 1))

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._is_whole():
            return self._with_newest(past, new)
        joined = super()._joined(past, new)
        # `QuantizedStates` have these attributes already.
        joined.mask_width, joined.sliding_window = self.max_length, None  # type: ignore[attr-defined]
        joined.dropped = self.tokens - joined.shape[2]  # type: ignore[attr-defined]
        return joined

    def reset(self) -> None:
        super().reset()
        self._is_moving = False

    def expected(self, state: dict) -> dict:
        return super().expected(state) | {"length": COUNT[: self._most + 1]}
