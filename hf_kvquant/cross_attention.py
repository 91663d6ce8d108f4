"""Layers of a decoder's cache that hold no tokens of the text (Mllama: the keys and values of its images).

They stay transformers' own, un-quantized: each is written once and read as it is, also by code that looks inside. A
rollback takes back tokens of the text, so it leaves them alone.
"""

from __future__ import annotations

import torch

from .host import DynamicLayer, StaticLayer


class CrossAttentionLayer(DynamicLayer):
    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what is cropped are tokens of the text."""


class StaticCrossAttentionLayer(StaticLayer):
    """As long as its first states: a text's `max_length` says nothing about an image."""

    supports_early_init = False

    def __init__(self):
        super().__init__(max_cache_len=0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.max_cache_len = key_states.shape[2]
        super().lazy_initialization(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what is cropped are tokens of the text."""


CROSS_ATTENTION = (CrossAttentionLayer, StaticCrossAttentionLayer)
