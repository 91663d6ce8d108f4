"""Attention of one layer with a sliding window, through any cache, and the bytes of whole caches with such layers.

There is no model: a layer is given the same random K and V in one update, as a prefill would, and its steps call what
a model would call, the update and the attention function. A whole cache is weighed by filling a layer of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import MistralConfig

from ..attention import attend
from ..cache import QuantizedCache
from ..host import ALL_ATTENTION_FUNCTIONS
from ..storage import storage_nbytes
from . import operator
from .caches import Candidate, Dense, Preset
from .step import Shape

_GEMMA3: dict[str, Any] = {"sliding_window": 1024, "max_position_embeddings": 131072}
# Public models with sliding layers: their config class, and what decides the bytes of their cache.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType({
    "Mistral 7B v0.1": ("MistralConfig", {"sliding_window": 4096, "head_dim": 128}),
    "Gemma 3 4B": ("Gemma3TextConfig", {
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, **_GEMMA3,
    }),
    "Gemma 3 27B": ("Gemma3TextConfig", {
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, **_GEMMA3,
    }),
    "GPT-OSS 20B": ("GptOssConfig", {
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "sliding_window": 128,
    }),
})  # fmt: skip


class SlidingLayer:
    """A candidate's cache of one layer after `length` tokens, and the same next token in every step.

    Args:
        shape: of the layer; its dtype is that of queries and states unless the candidate has one.
        room: the number of steps that the cache has room for.
    """

    def __init__(self, candidate: Candidate, shape: Shape, window: int, length: int, room: int):
        dtype = candidate.dtype or shape.dtype
        config = MistralConfig(
            num_hidden_layers=1, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, sliding_window=window, max_position_embeddings=length + room,
        )  # fmt: skip
        self.window = window
        self.cache: Any = candidate.build(config, length + room)
        states = operator.random_states(1, shape.kv_heads, length + 1, shape.head_dim, torch.float32)
        self._query = operator.random_query(1, shape.heads, 1, shape.head_dim, torch.float32).to(dtype)
        self._new = [x[:, :, length:].to(dtype).contiguous() for x in states]
        self._module = SimpleNamespace(num_key_value_groups=shape.heads // shape.kv_heads)
        key, value = (x[:, :, :length].to(dtype) for x in states)
        self.cache.update(key, value, 0)
        if isinstance(self.cache, QuantizedCache):
            self.cache.enable_fused()

    def mask(self) -> torch.Tensor:
        """The mask `[1, 1, 1, columns]` of the next step, which a model makes once for all of its layers."""
        length, first = self.cache.get_mask_sizes(1, 0)
        columns, position = torch.arange(length) + first, int(self.cache.get_seq_length())
        return ((columns <= position) & (columns > position - self.window))[None, None, None]

    def step(self, mask: torch.Tensor) -> torch.Tensor:
        """The output `[1, 1, heads, head_dim]` for the next token; as timed."""
        new_key, new_value = self._new
        key, value = self.cache.update(new_key, new_value, 0)
        return attend(
            self._module,  # type: ignore[arg-type]  # attention functions read one attribute of it
            self._query, key, value, mask, scaling=self._query.shape[-1] ** -0.5, sliding_window=self.window,
            dense_attention=ALL_ATTENTION_FUNCTIONS["sdpa"],
        )[0]  # fmt: skip

    def read_dequantized(self) -> None:
        """Give attention de-quantized copies of the window in later steps."""
        for layer in self.cache.quantized_layers:
            layer.takes_states = False


def weigh_model(name: str, presets: list[Preset], length: int, dtype: torch.dtype) -> list[dict]:
    """Bytes of the dense cache of one of `MODELS` after `length` tokens, and of each preset's, with and without
    quantized sliding layers; a `reason` in place of bytes if the cache refuses the model."""
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options)
    candidates: list[Candidate] = [Dense()]
    for preset in presets:
        native = Preset(f"{preset.name}, sliding: dense", replace(preset.config, sliding="dense"))
        candidates += [native, preset]
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        row: dict[str, Any] = {"model": name, "length": length, "name": candidate.name}
        rows.append(row)
        try:
            cache = candidate.build(config, length)
        except ValueError as error:
            row["reason"] = str(error)
            continue
        kinds = [(type(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]
        weights = {}
        for layer_kind in dict.fromkeys(kinds):
            layer_idx = kinds.index(layer_kind)
            # The last token comes alone, because until then a dense layer keeps all of its prompt.
            for n in (length - 1, 1):
                size = (2, 1, config.num_key_value_heads, n, config.head_dim)
                cache.update(*torch.randn(size).to(dtype), layer_idx)
            weights[layer_kind] = storage_nbytes(vars(cache.layers[layer_idx]))
            cache.layers[layer_idx].reset()
        row["cache_bytes"] = sum(weights[layer_kind] for layer_kind in kinds)
        row["share_of_dense_bytes"] = row["cache_bytes"] / rows[0]["cache_bytes"]
    return rows
