"""transformers' own quantized caches, driven token by token: only decode sees what they store.

They are used as transformers' guide recommends (quanto: axis 0, HQQ: axis 1), with its defaults for the rest: groups
of 64, and up to 128 tokens kept exact until they are quantized at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
import transformers
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..host import cache_inputs
from .methods import Method, keep_logits

_DEFAULTS = {"q_group_size": 64, "residual_length": 128}
PEERS = MappingProxyType(
    {
        "hqq-int8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, **_DEFAULTS},
        "transformers-fp8": {"backend": "fp8"},
        "quanto-int4": {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, **_DEFAULTS},
        "hqq-int4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1, **_DEFAULTS},
        "quanto-int2": {"backend": "quanto", "nbits": 2, "axis_key": 0, "axis_value": 0, **_DEFAULTS},
    }
)


def peers() -> list[Peer]:
    """All of `PEERS`, whether their packages are installed or not: what cannot run is reported, not left out."""
    return [Peer(name) for name in PEERS]


@dataclass(frozen=True)
class Peer(Method):
    """One of transformers' quantized caches, by its name in `PEERS`."""

    name: str
    kind = "peer"
    weighed_by_token = True

    def settings(self) -> dict:
        return {"cache": "transformers.QuantizedCache", **PEERS[self.name]}

    @torch.no_grad()
    def rows(self, model: PreTrainedModel, ids: torch.Tensor, context: int, first: int) -> Iterator[torch.Tensor]:
        cache = self.empty_cache(model.config, ids.shape[1])
        prompt = ids[:, :context]
        prefill = model(prompt, **cache_inputs(model, cache), **keep_logits(model, prompt, first)).logits[0]
        if first < context:
            yield prefill[first - context :]
        for step in range(context, ids.shape[1]):
            logits = model(ids[:, step : step + 1], **cache_inputs(model, cache)).logits[0]
            if step >= first:
                yield logits

    def empty_cache(self, config: PreTrainedConfig, max_length: int) -> Cache:
        return transformers.QuantizedCache(config=config, **PEERS[self.name])
