"""The caches that are compared: how each is scored, and what it weighs.

A `Method` yields the logits of a document's rows, and makes an empty cache whose bytes can be counted. The dense cache
and our presets are scored in one pass; transformers' quantized caches (`peer_caches`) only token by token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import DynamicLayer, cache_inputs, takes
from ..scoring import DENSE, score

FP16 = "fp16"


class Method(ABC):
    """One line of the comparison."""

    name: str
    kind: str  # "dense", "preset" or "peer"

    @abstractmethod
    def settings(self) -> dict:
        """What defines the cache, as plain data."""

    @abstractmethod
    def rows(self, model: PreTrainedModel, ids: torch.Tensor, context: int, first: int) -> Iterator[torch.Tensor]:
        """Logits of the rows `first .. length - 1` of `ids` `[1, length]`, in order, in pieces `[n, vocab]`.

        Row r predicts token r + 1. The first `context` columns are prefilled, the others decoded.
        """

    @abstractmethod
    def empty_cache(self, config: PreTrainedConfig, max_length: int) -> Cache:
        """The cache that is weighed, as a user would make it.

        Raises:
            Exception: it cannot be made here (a peer whose package is missing).
        """

    # Whether the bytes depend on how tokens arrive, and in which dtype the cache is weighed (None: the 16-bit one).
    weighed_by_token = False
    weighed_in_model_dtype = False


class Dense(Method):
    """The reference: transformers' `DynamicCache`, in the model's dtype."""

    name, kind = "dense", "dense"
    weighed_in_model_dtype = True

    def settings(self) -> dict:
        return {"cache": "DynamicCache"}

    def rows(self, model, ids, context, first):
        yield _one_pass(model, ids, context, DENSE, first)

    def empty_cache(self, config, max_length):
        return DynamicCache(config=config)


class Rounded(Method):
    """A dense cache of 16-bit floats: every key and value is rounded to float16 before it is read.

    What a dense cache in half precision costs, and the yardstick of what a difference can mean.
    """

    name, kind = FP16, "dense"

    def settings(self) -> dict:
        return {"cache": "DynamicCache", "dtype": "float16"}

    @torch.no_grad()
    def rows(self, model, ids, context, first):
        cache = DynamicCache(config=model.config)
        layers = [_RoundedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        cache = Cache(layers=layers)
        logits = model(ids, **cache_inputs(model, cache), **keep_logits(model, ids, first)).logits[0]
        yield logits[first - ids.shape[1] :]

    def empty_cache(self, config, max_length):
        return DynamicCache(config=config)


class _RoundedLayer(DynamicLayer):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rounded = (x.to(torch.float16).to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


@dataclass(frozen=True)
class Preset(Method):
    """One of ours."""

    name: str
    config: KVQuantConfig
    kind = "preset"

    def settings(self) -> dict:
        return self.config.to_dict()

    def rows(self, model, ids, context, first):
        yield _one_pass(model, ids, context, self.config, first)

    def empty_cache(self, config, max_length):
        return QuantizedCache(config, self.config, max_length=max_length)


def presets(names: Sequence[str]) -> list[Method]:
    """Methods by name: `fp16`, a preset's name, or the path of a config file (named by its stem).

    Raises:
        ValueError: a name is none of these, or stands there twice.
    """
    found = []
    for name in (name.strip() for name in names):
        if name == FP16:
            found.append(Rounded())
        else:
            try:
                found.append(Preset(Path(name).stem if Path(name).suffix else name, KVQuantConfig.load(name)))
            except ValueError as error:
                raise ValueError(f"presets: {error}; {FP16!r} is the dense cache in 16 bits") from None
    unique = [method.name for method in found]
    for name in unique:
        if unique.count(name) > 1 or name == Dense.name:
            raise ValueError(f"presets: {name!r} stands twice; expected each cache once ({Dense.name!r} always is)")
    return found


def keep_logits(model: PreTrainedModel, ids: torch.Tensor, first: int) -> dict:
    """What tells a model to compute the logits of the rows from `first` on only (at least one), where it can."""
    known = takes(model, "logits_to_keep")
    return {"logits_to_keep": max(ids.shape[1] - first, 1)} if known else {}


def _one_pass(model: PreTrainedModel, ids: torch.Tensor, context: int, kv_config, first: int) -> torch.Tensor:
    context = min(context, ids.shape[1])
    return score(model, ids, context, kv_config, **keep_logits(model, ids, first))[0][first - ids.shape[1] :]
