"""Layers with linear attention beside full or sliding attention: transformers keeps the linear states, the rest is
quantized.

Each method calls that of one half of the layer, or those of both halves in turn.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from .config import KVQuantConfig
from .evicting import EvictingQuantizedLayer
from .expected import linear
from .host import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from .layers import QuantizedLayer
from .route import Routes
from .sliding import SlidingQuantizedLayer
from .static import StaticQuantizedLayer
from .static_sliding import StaticSlidingQuantizedLayer
from .storage import storage_nbytes


class QuantizedHybridLayer(LinearAttentionAndFullAttentionLayer, QuantizedLayer):
    """A layer of both kinds whose full attention is a `QuantizedLayer`."""

    _attention: Any = QuantizedLayer
    _layer_type = None
    batch_repeat_interleave = QuantizedLayer.batch_repeat_interleave
    batch_select_indices = QuantizedLayer.batch_select_indices
    # Linear states stay on the device, because they are read and written without an `update` of the layer.
    offload = QuantizedLayer.offload
    prefetch = QuantizedLayer.prefetch

    def __init__(
        self, kv_config: KVQuantConfig, layer_idx: int, routes: Routes, max_length: int | None = None, *window: int
    ):
        LinearAttentionLayer.__init__(self)
        self._attention.__init__(self, kv_config, layer_idx, routes, max_length, *window)

    def set_linear_states(self, number_of_states: int) -> None:
        """Set how many linear states the layer keeps, before it is used."""
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *states: torch.Tensor, **linear_states: Any) -> None:
        if states:
            self._attention.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **linear_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        return self._attention.update(self, key_states, value_states)

    def get_max_length(self) -> int:
        return self._attention.get_max_length(self)

    def state(self) -> dict:
        linear = {name: getattr(self, name) for name in vars(LinearAttentionLayer(self.number_of_states))}
        return self._attention.state(self) | {"linear": linear}

    def restore(self, state: dict, device: torch.device | str) -> None:
        self._attention.restore(self, state, device)
        vars(self).update(state["linear"])

    def expected(self, state: dict) -> dict:
        return self._attention.expected(self, state) | {"linear": linear(self, state["linear"])}

    def _both(self, name: str, *args: Any) -> None:
        for part in (LinearAttentionLayer, self._attention):
            getattr(part, name)(self, *args)

    def reset(self) -> None:
        self._both("reset")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._both("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._both("crop", tokens_to_remove)

    def memory_report(self) -> Counter:
        nbytes = storage_nbytes({"conv": self.conv_states, "recurrent": self.recurrent_states})
        return super().memory_report() + Counter(dict.fromkeys(("dense", "total", "dense_equivalent"), nbytes))


class StaticQuantizedHybridLayer(QuantizedHybridLayer, StaticQuantizedLayer):
    """A layer of both kinds whose full attention is a `StaticQuantizedLayer`."""

    _attention = StaticQuantizedLayer
    _layer_type = None

    @property
    def is_compileable(self) -> bool:
        """False while linear states are recorded for a rollback, because they grow then; as in transformers."""
        return not self.record_past


class EvictingQuantizedHybridLayer(QuantizedHybridLayer, EvictingQuantizedLayer):
    """A layer of both kinds whose full attention is an `EvictingQuantizedLayer`."""

    _attention = EvictingQuantizedLayer
    _layer_type = None


class SlidingQuantizedHybridLayer(QuantizedHybridLayer, SlidingQuantizedLayer):
    """A layer of both kinds whose sliding attention is a `SlidingQuantizedLayer`."""

    is_sliding = True
    _attention = SlidingQuantizedLayer
    _layer_type = None


class StaticSlidingQuantizedHybridLayer(StaticQuantizedHybridLayer, StaticSlidingQuantizedLayer):
    """A layer of both kinds whose sliding attention is a `StaticSlidingQuantizedLayer`."""

    is_sliding = True
    _attention = StaticSlidingQuantizedLayer  # type: ignore[assignment]
    _layer_type = None
