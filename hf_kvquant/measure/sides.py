"""The sides of a model's cache: how each may be stored, and what one of them costs alone.

    found = sides(model, config)                    # {(0, "keys"): (num_kv_heads, head_dim), ...}
    alone(config, (0, "keys"))                      # only these keys are quantized, all else is dense
    losses(model, documents, {"mine": config}, 128, {})["mine"]["kl"]["mean"]

A *side* is the keys or the values of one layer. `specs` tries every combination of `CHOICES`, and keeps those that a
config takes: a format or grid that is added there is searched, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backends import gpu_refusal
from ..cache import QuantizedCache
from ..config import KVQuantConfig, LayerOverride
from ..layers import QuantizedLayer
from ..quantization import DENSE, FORMATS, GRIDS, QuantSpec
from .caches import Preset
from .comparison import Settings, compare
from .layer_errors import SIDES, Side, dense_states, square, stored
from .weighing import layer_shapes

# By field of a spec. Longer blocks are left out: a query reads its own block exactly, which hides the errors of others
# in texts that are not much longer.
CHOICES = {
    "format": (*FORMATS, DENSE),
    "grid": GRIDS,
    "group_size": (None, 64, 32, 16),
    "block_length": (None, 32, 64, 128),
    "rotate": (False, True),
}
DENSE_BITS = 16.0
# Formats of fewer bits, which lose many times more, are searched only where a budget or a config asks for them.
USUAL_BITS = 4


def sides(model: PreTrainedModel, config: KVQuantConfig) -> dict[Side, tuple[int, int]]:
    """`(num_kv_heads, head_dim)` of each side of the layers that a cache of this config quantizes."""
    layers = QuantizedCache(model.config, config).layers
    return {
        (i, side): shape
        for i, (_, shapes) in layer_shapes(model).items()
        if isinstance(layers[i], QuantizedLayer)
        for side, shape in zip(SIDES, shapes)
    }


def specs(side: str, head_dim: int, narrow: bool = False, device_type: str = "cpu") -> list[QuantSpec]:
    """Every spec of `CHOICES` that keys or values with this head_dim take on a device of this type, by rising bits;
    the last one is dense. `narrow`: with formats of less than `USUAL_BITS` bits."""
    found: dict[QuantSpec, QuantSpec] = {}
    for choice in itertools.product(*CHOICES.values()):
        fields: dict[str, Any] = dict(zip(CHOICES, choice))
        try:
            spec = QuantSpec(**fields)
            if is_narrow(spec) and not narrow:
                continue
            pair: dict[str, Any] = dict.fromkeys(SIDES, QuantSpec(DENSE)) | {side: spec}
            if device_type == "cuda" and gpu_refusal(**pair, head_dims=(head_dim, head_dim)):
                continue
            KVQuantConfig(**pair)
            found.setdefault(spec.resolve(head_dim), spec)
        except ValueError:
            continue
    return sorted(found.values(), key=lambda spec: bits(spec, head_dim))


def is_narrow(spec: QuantSpec) -> bool:
    """Whether the format has less than `USUAL_BITS` bits."""
    return not spec.is_dense and FORMATS[spec.format].bits < USUAL_BITS


def bits(spec: QuantSpec, head_dim: int) -> float:
    """Stored bits per element, exact tokens left out."""
    return DENSE_BITS if spec.is_dense else spec.bits_per_element(head_dim)


def fewest_usual_bits(shapes: Mapping[Side, tuple[int, int]]) -> float:
    """The fewest stored bits per element of all `sides` together without narrow formats, exact tokens left out."""
    elements = {side: heads * head_dim for side, (heads, head_dim) in shapes.items()}
    fewest = {side: bits(specs(side[1], head_dim)[0], head_dim) for side, (_, head_dim) in shapes.items()}
    return sum(elements[side] * fewest[side] for side in shapes) / sum(elements.values())


def total_bits(config: KVQuantConfig, shapes: Mapping[Side, tuple[int, int]]) -> float:
    """Stored bits per element of all `sides` together, exact tokens left out."""
    spec = {side: config.for_layer(side[0])[SIDES.index(side[1])] for side in shapes}
    elements = {side: heads * head_dim for side, (heads, head_dim) in shapes.items()}
    stored = sum(elements[side] * bits(spec[side], head_dim) for side, (_, head_dim) in shapes.items())
    return stored / sum(elements.values())


def with_specs(config: KVQuantConfig, chosen: Mapping[Side, QuantSpec]) -> KVQuantConfig:
    """The config with other specs on single sides."""
    layers = dict(config.layers)
    for (layer_idx, side), spec in chosen.items():
        given: dict[str, Any] = {side: spec}
        layers[layer_idx] = replace(layers.get(layer_idx, LayerOverride()), **given)
    return replace(config, layers=tuple(layers.items()))


def alone(config: KVQuantConfig, side: Side, spec: QuantSpec | None = None) -> KVQuantConfig:
    """The config with every side dense but one, which has `spec` (None: the config's own); windows stay."""
    spec = spec or config.for_layer(side[0])[SIDES.index(side[1])]
    dense = replace(config, keys=QuantSpec(DENSE), values=QuantSpec(DENSE), layers=(), error_feedback=None)
    return fed(with_specs(dense, {side: spec}), config.error_feedback)


def fed(config: KVQuantConfig, error_feedback: str | None) -> KVQuantConfig:
    """The config with this error feedback, if a side of it has any."""
    return replace(config, error_feedback=error_feedback if config.has_channels else None)


def promising(
    model: PreTrainedModel,
    documents: torch.Tensor,
    shapes: Mapping[Side, tuple[int, int]],
    slack: float = 1.0,
    narrow: bool = False,
) -> dict[Side, list[QuantSpec]]:
    """The `specs` of each side that no other one beats, by rising bits; the last one is dense.

    One that beats another has no more bits, and stores states with less than `1 / slack` of the other's error. This
    needs one pass over the documents for all sides and specs together. In a sliding layer no spec is left out.
    """
    device_type = model.device.type
    found = {side: specs(side[1], head_dim, narrow, device_type) for side, (_, head_dim) in shapes.items()}
    errors: dict[tuple[Side, QuantSpec], float] = {}
    for ids in documents.split(1):
        for side, x in dense_states(model, ids).items():
            for spec in found.get(side, []):
                error = square(x - stored(x, spec))
                # Not a number where a state is not.
                errors[side, spec] = errors.get((side, spec), 0.0) + (error if error == error else math.inf)

    def is_beaten(side: Side, spec: QuantSpec) -> bool:
        if (side, spec) not in errors:
            return False
        head_dim, error = shapes[side][1], errors[side, spec]
        others = [other for other in found[side] if bits(other, head_dim) <= bits(spec, head_dim)]
        return any(slack**2 * errors[side, other] < error for other in others)

    return {side: [spec for spec in found[side] if not is_beaten(side, spec)] for side in shapes}


def losses(
    model: PreTrainedModel,
    documents: torch.Tensor,
    configs: Mapping[str, KVQuantConfig],
    context: int,
    facts: dict,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """The figures of `compare` for each config by its name (`kl`, `agreement`, ...), without bytes and greedy text."""
    candidates = [Preset(name, config) for name, config in configs.items()]
    settings = Settings(context, greedy_tokens=0)
    result = compare(
        model, documents, candidates, settings, facts, folder, progress=progress, by_layer=False, weigh=False
    )
    return result["caches"]
