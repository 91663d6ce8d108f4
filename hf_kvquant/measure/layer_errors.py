"""The loss of a format by layer: relative errors of keys and values, on the model's own states of a text."""

from __future__ import annotations

import math

import torch
from transformers import DynamicCache, PreTrainedModel

from ..config import KVQuantConfig
from ..host import DynamicLayer, cache_inputs
from ..quantization import QuantSpec, quantize

# The keys or the values of one layer: its index, and one of `SIDES`.
Side = tuple[int, str]
SIDES = ("keys", "values")


@torch.no_grad()
def dense_states(model: PreTrainedModel, ids: torch.Tensor) -> dict[Side, torch.Tensor]:
    """Keys and values `[1, num_kv_heads, length, head_dim]` that the dense cache holds after `ids` `[1, length]`.

    Only layers with full attention hold every token, so there are no others.
    """
    cache = DynamicCache(config=model.config)
    model(ids, **cache_inputs(model, cache))
    layers = [(i, layer) for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    return {(i, side): x for i, layer in layers for side, x in zip(SIDES, (layer.keys, layer.values))}


def layer_errors(
    model: PreTrainedModel, documents: torch.Tensor, configs: dict[str, KVQuantConfig], centred: bool = False
) -> dict[str, dict[str, list[float | None]]]:
    """`|x - stored x| / |x|` (Euclidean norms over all tokens) by config, then `keys` and `values`, one per layer.

    Every token counts, including those of which a window keeps exact copies. None if a layer is not quantized.

    Args:
        documents: token ids `[documents, length]`; keys and values are those of the dense cache.
        centred: divide by `|x - its mean over a document's tokens|`. Attention ignores what all keys have in common,
            so an error that is small beside it may still be large.
    """
    lost, total = {}, {}
    for ids in documents.split(1):
        for side, x in dense_states(model, ids).items():
            total[side] = total.get(side, 0.0) + square(x - x.mean(2, keepdim=True) if centred else x)
            for name, config in configs.items():
                error = square(x - stored(x, config.for_layer(side[0])[SIDES.index(side[1])]))
                lost[name, side] = lost.get((name, side), 0.0) + error

    def relative(name: str, side: Side) -> float | None:
        if side not in total:
            return None
        if not total[side]:
            return math.inf if lost[name, side] else 0.0
        return (lost[name, side] / total[side]) ** 0.5

    layers = range(len(DynamicCache(config=model.config).layers))
    return {name: {side: [relative(name, (i, side)) for i in layers] for side in SIDES} for name in configs}


def stored(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The copy of `x` that is read from a cache."""
    return x if spec.is_dense else quantize(x, spec).dequantize(x.dtype)


def square(x: torch.Tensor) -> float:
    """The sum of squares, in float64."""
    return x.double().square().sum().item()
