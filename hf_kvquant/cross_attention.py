"""Layers of a decoder's cache that do not hold tokens of the text (in Mllama they hold keys and values of images).

They stay transformers' own, un-quantized: each is written once, and models also read their tensors directly. A crop
removes tokens of the text, so it leaves these layers alone.
"""

from __future__ import annotations

import torch

from .host import DynamicLayer, StaticLayer


class CrossAttentionLayer(DynamicLayer):
    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing, because only tokens of the text are cropped."""


class StaticCrossAttentionLayer(StaticLayer):
    """A layer as long as its first states, because the `max_length` of a text says nothing about an image."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__(max_cache_len=0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.max_cache_len = key_states.shape[2]
        super().lazy_initialization(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing, because only tokens of the text are cropped."""


CROSS_ATTENTION = (CrossAttentionLayer, StaticCrossAttentionLayer)
