"""The one list of caches that are compared or timed: their names, how each is made, and how it is scored.

    for candidate in (Dense(), *presets(["int8", "int4"]), *peers()):
        cache = candidate.build(model.config, max_length)

A name means the same cache in every table and result file. A new cache to compare is a line of `PEERS`, or a subclass
of `Candidate`. The dense cache and our presets are scored in one pass; transformers' quantized caches only token by
token, because only decode sees what they store.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import DynamicLayer, cache_inputs, takes
from ..quantization import FORMATS, QuantSpec
from ..scoring import DENSE as NOT_QUANTIZED
from ..scoring import score, score_by_decoding

DENSE, FP16 = "dense", "fp16"
# The settings that transformers' guide recommends (quanto: axis 0, HQQ: axis 1), otherwise with its defaults: groups
# of 64, and up to 128 tokens kept exact until they are quantized at once.
_DEFAULTS = {"q_group_size": 64, "residual_length": 128}
PEERS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "hqq-int8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, **_DEFAULTS},
        "transformers-fp8": {"backend": "fp8"},
        "quanto-int4": {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, **_DEFAULTS},
        "hqq-int4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1, **_DEFAULTS},
        "quanto-int2": {"backend": "quanto", "nbits": 2, "axis_key": 0, "axis_value": 0, **_DEFAULTS},
    }
)


class Candidate(ABC):
    """One row of every table."""

    name: str
    kind: str  # "dense", "preset" or "peer"
    bits: int  # of a stored element: the coarser one of keys and values
    dtype: torch.dtype | None = None  # of the states that it is given; None: the model's
    steps = "plain"  # or "compiled", or "captured": how its decode steps are run where they are timed
    # Whether the bytes depend on how tokens arrive; and the dtype in which they are counted (None: the 16-bit one).
    weighed_by_token = False
    weighed_in_model_dtype = False

    @abstractmethod
    def settings(self) -> dict:
        """The settings that define the cache, as plain data."""

    @abstractmethod
    def build(self, config: PreTrainedConfig, max_length: int) -> Cache:
        """An empty cache with room for `max_length` tokens, as a user would make it.

        Raises:
            Exception: the cache cannot be made here (the package of a peer is missing).
        """

    @abstractmethod
    def rows(self, model: PreTrainedModel, ids: torch.Tensor, context: int, first: int) -> Iterator[torch.Tensor]:
        """Logits of the rows `first .. length - 1` of `ids` `[1, length]`, in order, in pieces `[n, vocab]`.

        Row r predicts token r + 1. The first `context` tokens are prefilled, the others decoded.
        """

    def running(self, steps: str) -> Candidate:
        """The same cache, with its decode steps "compiled" (by torch.compile) or "captured" (in a CUDA graph)."""
        twin = copy.copy(self)
        twin.name, twin.steps = f"{self.name}-{steps}", steps
        return twin


@dataclass
class Dense(Candidate):
    """The reference: transformers' `DynamicCache`, or its `StaticCache`, in `dtype`."""

    name: str = DENSE
    dtype: torch.dtype | None = None
    static: bool = False
    kind = "dense"
    weighed_in_model_dtype = True

    @property
    def bits(self) -> int:
        return 8 * (self.dtype or torch.float16).itemsize

    def settings(self) -> dict:
        return {"cache": "StaticCache" if self.static else "DynamicCache"}

    def rows(self, model, ids, context, first):
        yield one_pass(model, ids, context, NOT_QUANTIZED, first)

    def build(self, config, max_length):
        return StaticCache(config=config, max_cache_len=max_length) if self.static else DynamicCache(config=config)


def dense_caches(dtype: torch.dtype) -> list[Candidate]:
    """The dense caches for comparison: the reference, the same in float32, and the one of a fixed length."""
    return [Dense(dtype=dtype), Dense(f"{DENSE}-float32", torch.float32), Dense(f"{DENSE}-static", dtype, static=True)]


class Rounded(Candidate):
    """A dense cache of 16-bit floats: every key and value is rounded to float16 before it is read.

    It shows the cost of a dense cache in half precision, a yardstick for the other differences.
    """

    name, kind, bits = FP16, "dense", 16

    def settings(self) -> dict:
        return {"cache": "DynamicCache", "dtype": "float16"}

    @torch.no_grad()
    def rows(self, model, ids, context, first):
        dense = DynamicCache(config=model.config)
        layers = [_RoundedLayer() if type(layer) is DynamicLayer else layer for layer in dense.layers]
        cache = Cache(layers=layers)
        logits = model(ids, **cache_inputs(model, cache), **_keep_logits(model, ids, first)).logits[0]
        yield logits[first - ids.shape[1] :]

    def build(self, config, max_length):
        return DynamicCache(config=config)


class _RoundedLayer(DynamicLayer):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rounded = (x.to(torch.float16).to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


@dataclass
class Preset(Candidate):
    """A cache of ours."""

    name: str
    config: KVQuantConfig
    kind = "preset"

    @property
    def bits(self) -> int:
        return min(FORMATS[s.format].bits if not s.is_dense else 16 for s in (self.config.keys, self.config.values))

    def settings(self) -> dict:
        return self.config.to_dict()

    def rows(self, model, ids, context, first):
        yield one_pass(model, ids, context, self.config, first)

    def build(self, config, max_length):
        return QuantizedCache(config, self.config, max_length=max_length)


@dataclass
class Decoded(Preset):
    """A cache of ours, driven token by token as `generate` does. Slower, and the same figures up to rounding."""

    def rows(self, model, ids, context, first):
        context = min(context, ids.shape[1])
        yield score_by_decoding(model, ids, context, self.config)[0][first - ids.shape[1] :]


def presets(names: Sequence[str]) -> list[Candidate]:
    """Candidates by name: `fp16`, a preset's name, or the path of a config file (named by its stem).

    Raises:
        ValueError: a name is none of these, or is given twice.
    """
    found: list[Candidate] = []
    for name in (name.strip() for name in names):
        if name == FP16:
            found.append(Rounded())
        else:
            try:
                found.append(Preset(Path(name).stem if Path(name).suffix else name, KVQuantConfig.load(name)))
            except ValueError as error:
                raise ValueError(f"presets: {error}; {FP16!r} is the dense cache in 16 bits") from None
    unique = [candidate.name for candidate in found]
    for name in unique:
        if unique.count(name) > 1 or name == DENSE:
            raise ValueError(f"presets: {name!r} stands twice; expected each cache once ({DENSE!r} always is)")
    return found


def grids() -> dict[str, KVQuantConfig]:
    """Every preset, and every format on either grid of keys that is not a preset already; no windows."""
    found = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
    for format in FORMATS:
        values = QuantSpec(format)
        for grid in ("token", "channel"):
            config = KVQuantConfig(keys=values if grid == "token" else QuantSpec(format, grid), values=values)
            if config not in found.values():
                found[f"{format}-{grid}"] = config
    return found


@dataclass
class Peer(Candidate):
    """One of transformers' own quantized caches, by its name in `PEERS`."""

    name: str
    kind = "peer"
    weighed_by_token = True

    @property
    def bits(self) -> int:
        return PEERS[self.name].get("nbits", 8)

    def settings(self) -> dict:
        return {"cache": "transformers.QuantizedCache", **PEERS[self.name]}

    @torch.no_grad()
    def rows(self, model, ids, context, first):
        cache = self.build(model.config, ids.shape[1])
        prompt = ids[:, :context]
        prefill = model(prompt, **cache_inputs(model, cache), **_keep_logits(model, prompt, first)).logits[0]
        if first < context:
            yield prefill[first - context :]
        for step in range(context, ids.shape[1]):
            logits = model(ids[:, step : step + 1], **cache_inputs(model, cache)).logits[0]
            if step >= first:
                yield logits

    def build(self, config, max_length):
        return transformers.QuantizedCache(config=config, **PEERS[self.name])


def peers(names: Sequence[str] = tuple(PEERS)) -> list[Candidate]:
    """Some or all of `PEERS`, whether their packages are installed or not: one that cannot run is reported."""
    return [Peer(name) for name in names]


def _keep_logits(model: PreTrainedModel, ids: torch.Tensor, first: int) -> dict:
    """The argument, if any, that makes a model compute only the logits of the rows from `first` on (at least one)."""
    known = takes(model, "logits_to_keep")
    return {"logits_to_keep": max(ids.shape[1] - first, 1)} if known else {}


def one_pass(
    model: PreTrainedModel, ids: torch.Tensor, context: int, kv_config: KVQuantConfig | str, first: int, **options: Any
) -> torch.Tensor:
    """The logits of `Candidate.rows` as one piece; `options` are those of `score`."""
    context = min(context, ids.shape[1])
    options |= _keep_logits(model, ids, first)
    return score(model, ids, context, kv_config, **options)[0][first - ids.shape[1] :]
