"""Layers of a cache in the main memory: each comes to its device while the one before it works (`offload: true`).

    compute stream   wait | layer 0: append, out, attention, MLP | wait | layer 1: append, out, attention, MLP | ...
    copy stream           | layer 1: in                          |      | layer 2: in                          | ...

So two layers at most are on the device. The order of the copies is that of transformers' offloaded caches, and the
bytes are those of the quantized cache. Two differences: the compute stream is the current one and not the default one,
and the CPU waits for the copies before it reads what they write.

Positions of sinks, padding and counters stay on the device. They are small, and the host reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from .cross_attention import CROSS_ATTENTION
from .host import CacheLayerMixin, LinearAttentionCacheLayerMixin
from .layers import QuantizedLayer
from .route import Routes
from .static import is_traced
from .storage import HOST


@lru_cache(maxsize=None)
def _copy_stream(device: torch.device) -> torch.Stream:
    """The stream that brings layers to a device. It belongs to no cache, because streams cannot be deep-copied."""
    return torch.Stream(device)


@contextmanager
def _copies(device: torch.device) -> Iterator[None]:
    """Within this context work is added to the copy stream, behind everything on the compute stream: copies to the
    main memory may be on their way there, and the memory that a copy takes may still be read."""
    stream = _copy_stream(device)
    stream.wait_stream(torch.accelerator.current_stream(device))
    with stream:
        yield


def check_device(device: torch.device) -> None:
    """Check that layers can be moved from a device to the main memory.

    Raises:
        ValueError: the device has no memory of its own.
    """
    if device.type == HOST:
        raise ValueError(
            f"offload: True is not allowed for a model on {device}, whose layers are in the main memory already; "
            "expected false, or a model on a GPU"
        )


def is_offloaded_kind(layer: Any) -> bool:
    """Whether a cache with `offload: true` moves such a layer. Linear states, and the states of images, are read
    without an update, before which they could come back."""
    if isinstance(layer, QuantizedLayer):
        return True
    return isinstance(layer, CacheLayerMixin) and not isinstance(
        layer, (LinearAttentionCacheLayerMixin, *CROSS_ATTENTION)
    )


class OffloadedLayers:
    """The part of a cache that moves its `layers`."""

    layers: list[Any]
    offloading: bool
    _routes: Routes

    def _update_offloaded(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """`Cache.update`, with the layer on its device, and the next one on its way there.

        Raises:
            ValueError: the step is compiled or captured, which needs fixed addresses, or the device is a CPU.
        """
        if is_traced():
            raise ValueError(
                "offload: True is not allowed in steps that are compiled or captured, because the addresses of layers "
                "change; expected false"
            )
        layer = self.layers[layer_idx]
        if not is_offloaded_kind(layer):
            return layer.update(key_states, value_states, *args, **kwargs)
        check_device(key_states.device)
        # What a recorded step holds stays on the device.
        self._routes.steps[:] = [step for step in self._routes.steps if step.is_held]
        torch.accelerator.current_stream(key_states.device).wait_stream(_copy_stream(key_states.device))
        # It has come already, unless layers were not called in their order.
        layer.prefetch()
        following = self._following(layer_idx)
        if following is not layer and following.is_initialized:
            with _copies(following.device):
                following.prefetch()
        states = layer.update(key_states, value_states, *args, **kwargs)
        layer.offload()
        return states

    def _following(self, layer_idx: int) -> Any:
        """The next layer that is moved, which after the last one is the first one."""
        order = [*self.layers[layer_idx + 1 :], *self.layers[: layer_idx + 1]]
        return next(layer for layer in order if is_offloaded_kind(layer))

    def settle(self) -> None:
        """Wait until copies to the main memory are complete, before the CPU reads them."""
        if self.offloading:
            moved = (layer for layer in self.layers if is_offloaded_kind(layer) and layer.is_initialized)
            for device in {layer.device for layer in moved}:
                torch.accelerator.synchronize(device)
