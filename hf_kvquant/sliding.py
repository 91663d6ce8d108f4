"""`SlidingQuantizedLayer`: a quantized layer whose queries see a window of the last tokens, and whose bytes it bounds.

Columns are retired from the front: when the storage is full, those that are still needed move into new storage, and
the first column of that is `dropped` tokens from the beginning. They are whole blocks, and every rule about columns
(which block a column is in, how far it is from a query) is about differences, so a query reads what it would read if
all columns had stayed. A mask has the columns of transformers' own layers of this kind; the ones stored before those
are hidden when attention widens it.

            dropped        |  columns 0 .. length of the storage
    -----------------------+--------------------+---------------------------+
    retired                | hidden, but a crop | seen by the newest query  |
                           | may need them      | (sliding_window)          |
"""

from __future__ import annotations

from collections import Counter

import torch

from .config import KVQuantConfig
from .expected import BOOL, COUNT, Bounds
from .layers import QuantizedLayer
from .route import Routes
from .states import QuantizedStates, Stored, mask_length
from .storage import ROLLBACK, Side


class SlidingQuantizedLayer(QuantizedLayer):
    """A `QuantizedLayer` in the place of a `DynamicSlidingWindowLayer`.

    Its storage never holds more than the window, `ROLLBACK` tokens that a crop may bring back into it, and as many
    again (on the channel grid: at least a block), so that columns move once in that many tokens. While `record_past`,
    which assisted decoding asks for, nothing is retired until the next crop, as in transformers.
    """

    is_sliding = True

    def __init__(
        self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int | None, sliding_window: int
    ):
        super().__init__(kv_config, layer_idx, routes, max_length)
        self.sliding_window = self._window = sliding_window
        self.record_past = False
        self.dropped = 0
        # The first column is hidden from every query: it stands for sinks that are retired.
        self._kept = self._window + ROLLBACK
        # Whole blocks of both sides: block lengths are powers of two.
        self._block = max(spec.block_length or 1 for spec in kv_config.for_layer(layer_idx))
        self._front = self._whole_blocks(self._front_columns())
        self._most = self._front + self._whole_blocks(self._kept + max(self._block, ROLLBACK))
        # The most tokens that are stored at once: one column stays before them, or their first would count as sinks.
        self._piece = self._kept - 1
        # How many tokens there were when the last update began.
        self._before = 0

    def _whole_blocks(self, columns: int) -> int:
        return -(-columns // self._block) * self._block

    def _front_columns(self) -> int:
        """How many columns at the front are never retired."""
        return 0

    @property
    def tokens(self) -> int:
        return self.dropped + self.length

    def activate_past_recording(self) -> None:
        """Keep what the next tokens push out of the window until the next crop."""
        self.record_past = True

    def _keeps_past(self) -> bool:
        """Whether nothing is retired for now."""
        return self.record_past

    def get_max_length(self) -> int:
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and first of the columns that a mask for the next queries has."""
        end = self.tokens + query_length
        length = mask_length(end, self.sliding_window, query_length)
        return length, end - length

    def _first_capacity(self, n: int) -> int:
        capacity = super()._first_capacity(n)
        return capacity if self._keeps_past() else min(capacity, self._most)

    def _grown(self, capacity: int, needed: int) -> int:
        grown = super()._grown(capacity, needed)
        return grown if self._keeps_past() else max(needed, min(grown, self._most))

    def reserve(self, max_length: int, exact: bool = True) -> None:
        super().reserve(max_length if self._keeps_past() else min(max_length, self._most), exact)

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return super()._joined(past[:, :, max(past.shape[2] - self.sliding_window + 1, 0) :], new)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[QuantizedStates, QuantizedStates]:
        self._before = self.tokens
        for keys, values in zip(self._pieces(key_states), self._pieces(value_states)):
            # A piece that is stored without the next is no whole update.
            self.storing = self.tokens != self._before
            end = self.length + keys.shape[2]
            if end > self._most and not self._keeps_past():
                self._retire(end)
            views = super()._append(keys, values)
        return views

    def _pieces(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """New states, in pieces for which there is room if older columns are retired."""
        if self._keeps_past() or self.length + states.shape[2] <= self._most:
            return (states,)
        return states.split(self._piece, dim=2)

    def _gone(self, end: int) -> int:
        """How many columns are retired before there are `end` columns."""
        return max(min(end - self._kept, self.length) - self._front, 0) // self._block * self._block

    def _retire(self, end: int) -> None:
        """Retire whole blocks that no query will see, before there are `end` columns."""
        gone = self._gone(end)
        if not gone and self._keys.capacity <= self._most:
            return
        sides = self._keys, self._values
        capacity = min(max(side.capacity for side in sides), self._most)
        moved = [self._moved(side, max(capacity, self.length - gone), gone) for side in sides]
        positions = self._moved_sinks(gone)
        for side, stored in zip(sides, moved):
            first = self._front if gone and stored.recent is not None else 0
            side.stored, side.recent_start = stored, max(side.recent_start - gone, first)
        self.sink_positions = positions
        self.length, self.dropped = self.length - gone, self.dropped + gone

    def _moved(self, side: Side, capacity: int, gone: int) -> Stored:
        """The columns of a side from `gone` on in new storage."""
        return side.moved(capacity, self.length, gone)

    def _moved_sinks(self, gone: int) -> torch.Tensor:
        """The columns of sinks after `gone` were retired: a sink that is gone keeps its slot, in a hidden column."""
        return torch.where(self.sink_positions < 0, -1, (self.sink_positions - gone).clamp(min=0))

    def _padding_of_columns(self) -> torch.Tensor | None:
        return None if self.padding is None else self.padding[:, self.dropped :]

    def _has_lost(self) -> bool:
        if self._before == 0:
            self.length = self.dropped = 0
        has_window = not self.dropped or self.length - self._front >= self._window
        return self.tokens != self._before or not has_window or super()._has_lost()

    def tokens_after(self, tokens_to_remove: int) -> int:
        """How many tokens a `crop` would leave.

        Raises:
            RuntimeError: what their queries would see is retired.
        """
        tokens = super().tokens_after(tokens_to_remove)
        most = self.length - self._front - self._window
        if tokens and self.dropped and self.tokens - tokens > most:
            raise RuntimeError(
                f"crop: {self.tokens - tokens} tokens cannot be removed from layer {self.layer_idx}, whose window of "
                f"{self._window} tokens has left what came before; expected at most {most}, or "
                "activate_past_recording() before they come"
            )
        return tokens

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized and self._keys.capacity > self._most:
            self._retire(self.length)

    def _go_back(self, removed: int) -> None:
        if removed == self.tokens:
            self.length = self.dropped = 0
        else:
            super()._go_back(removed)

    def reset(self) -> None:
        super().reset()
        self.dropped = 0

    def memory_report(self) -> Counter:
        report = super().memory_report()
        if self.length:
            # What transformers' own layer would keep.
            seen = min(self.length, self.sliding_window - 1)
            report["dense_equivalent"] = report["dense_equivalent"] // self.length * seen
        return report

    def state(self) -> dict:
        return super().state() | {"dropped": self.dropped, "record_past": self.record_past}

    def restore(self, state: dict, device: torch.device | str) -> None:
        super().restore(state, device)
        self.dropped, self.record_past = state["dropped"], state["record_past"]

    def expected(self, state: dict) -> dict:
        pattern = super().expected(state) | {"dropped": 0, "record_past": BOOL}
        if state["length"] - self._front >= self._window and state["dropped"] != 0:
            pattern["dropped"] = COUNT[:: self._block]
            sinks = pattern["sink_positions"]
            pattern["sink_positions"] = Bounds(sinks.low, sinks.high, fills=True, zeros=not self._front)
        return pattern
