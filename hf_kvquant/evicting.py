"""`EvictingQuantizedLayer`: a full-attention layer that keeps its sinks and a window of the last tokens, and drops the
rest, without training (StreamingLLM, https://arxiv.org/abs/2309.17453).

    KVQuantConfig.from_dict({..., "sink_length": 4, "window_length": 4096})

A query sees the sinks and the last `window_length` tokens, its own included. A prompt, and a later turn of more than
`ops.MAX_Q_LEN` tokens, attends exactly to all of itself, a turn also to the sinks and the last tokens before it:
eviction begins with what is stored. Keys keep the rotary positions that they were stored with. (The paper caches keys
before rotation, and rotates them by their place in the cache, so that distances stay within those of training. Here
the distance between a query and the sinks grows with the text, as without eviction.)

It is a sliding layer (see `sliding`) whose first columns stay. Sinks that would be retired move there:

         front           |  columns front .. length of the storage
    ---------------------+-------------------------+---------------------------+
    slot i: sink i, once | hidden but for sinks; a | seen by the newest query  |
    it left its column   | crop may need them      | (window_length)           |

The model makes its mask for all tokens. Attention gets the columns of it that are stored; see `states.Kept`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from .config import KVQuantConfig
from .layers import QuantizedLayer
from .route import Routes
from .sliding import SlidingQuantizedLayer
from .states import Kept, QuantizedStates, Stored
from .storage import Side


class EvictingQuantizedLayer(SlidingQuantizedLayer):
    """A `QuantizedLayer` that stores the sinks, the last `window_length` tokens, and a few that a crop may need.

    Raises:
        ValueError: tokens would be evicted that the model's attention code cannot be told about, because it is its own
            or runs outside of `hf_kvquant.attention(model)`.
    """

    is_sliding = False
    get_mask_sizes = QuantizedLayer.get_mask_sizes
    get_max_length = QuantizedLayer.get_max_length
    _records = QuantizedLayer._records

    def __init__(
        self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int | None, window_length: int
    ):
        # A query reads nothing exactly that it does not see.
        kv_config = replace(kv_config, recent_length=min(kv_config.recent_length, window_length))
        super().__init__(kv_config, layer_idx, routes, max_length, window_length)
        self.sliding_window = None

    def _front_columns(self) -> int:
        return self.kv_config.sink_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        if self.is_filled and not self.takes_states and self._hides(self.tokens + key_states.shape[2]):
            raise ValueError(
                f"window_length: {self._window} tokens cannot be the window of layer {self.layer_idx}: its attention "
                "does not take the cached states as they are, so it would not know which of them are left; run the "
                "whole generation inside of hf_kvquant.attention(model), or set window_length to 'all'"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def _hides(self, tokens: int) -> bool:
        """Whether the newest of `tokens` tokens does not see all of them."""
        return tokens > self._window

    def _states(self, side: Side, length: int | None = None, *args: Any, **place: Any) -> QuantizedStates:
        length, kept = self.length if length is None else length, None
        if self._hides(self.dropped + length):
            front = self._front if self.dropped else 0
            kept = Kept(front, self.dropped + front, self._window)
        return super()._states(side, length, *args, kept=kept, **place)

    def _past(self, states: QuantizedStates) -> torch.Tensor:
        past = super()._past(states)
        if not self._hides(self.tokens + 1):
            return past
        first = self.length - self._window + 1
        sinks = (self.sink_positions >= 0) & (self.sink_positions < first)
        seen = torch.cat([self._sinks(past), past[:, :, first:]], dim=2)
        is_sink = torch.nn.functional.pad(sinks, (0, self._window - 1))
        seen.kept = Kept(sinks.shape[1], self.dropped + first, None, is_sink)  # type: ignore[attr-defined]
        return seen

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        joined, kept = QuantizedLayer._joined(self, past, new), getattr(past, "kept", None)
        if kept is not None:
            is_sink = torch.nn.functional.pad(kept.is_sink, (0, new.shape[2]))
            joined.kept = kept._replace(is_sink=is_sink)  # type: ignore[attr-defined]
        return joined

    def _moved(self, side: Side, capacity: int, gone: int) -> Stored:
        stored = side.moved(capacity, self.length, gone, self._front)
        if gone and side.spec.is_dense:
            # Its sinks have no exact copies beside it.
            stored.data[:, :, : self.kv_config.sink_length] = self._sinks(side.data)
        return stored

    def _sinks(self, columns: torch.Tensor) -> torch.Tensor:
        """The columns of sinks `[batch, num_kv_heads, sink_length, head_dim]`, arbitrary for slots without one."""
        batch, heads, _, head_dim = columns.shape
        index = self.sink_positions.to(columns.device).clamp(min=0).long()[:, None, :, None]
        return columns.gather(2, index.expand(batch, heads, -1, head_dim))

    def _moved_sinks(self, gone: int) -> torch.Tensor:
        positions = self.sink_positions
        if not gone:
            return positions
        slots = torch.arange(positions.shape[1], dtype=positions.dtype, device=self.device)
        left = (positions >= 0) & (positions < self._front + gone)
        return torch.where(left, slots, torch.where(positions < 0, -1, positions - gone))

    def memory_report(self) -> Counter:
        report = QuantizedLayer.memory_report(self)
        if self.length:
            # The dense cache keeps every token.
            report["dense_equivalent"] = report["dense_equivalent"] // self.length * self.tokens
        return report
