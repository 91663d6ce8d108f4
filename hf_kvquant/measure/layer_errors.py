"""The loss of a format by layer: relative errors of keys and values, on the model's own states of a text."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from ..config import KVQuantConfig
from ..host import DynamicLayer, cache_inputs
from ..quantization import QuantSpec, quantize


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, documents: torch.Tensor, configs: dict[str, KVQuantConfig]
) -> dict[str, dict[str, list[float | None]]]:
    """`|x - stored x| / |x|` (Euclidean norms over all tokens) by config, then `keys` and `values`, one per layer.

    Every token counts, including those of which a window keeps exact copies. None if a layer is not quantized.

    Args:
        documents: token ids `[documents, length]`; keys and values are those of the dense cache.
    """
    lost, total = {}, {}
    for ids in documents.split(1):
        cache = DynamicCache(config=model.config)
        model(ids, **cache_inputs(model, cache))
        for layer_idx, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                continue
            for side, x in enumerate((layer.keys, layer.values)):
                total[layer_idx, side] = total.get((layer_idx, side), 0.0) + _square(x)
                for name, config in configs.items():
                    error = _square(x - _stored(x, config.for_layer(layer_idx)[side]))
                    lost[name, layer_idx, side] = lost.get((name, layer_idx, side), 0.0) + error

    def relative(name: str, layer_idx: int, side: int) -> float | None:
        if (layer_idx, side) not in total:
            return None
        return (lost[name, layer_idx, side] / total[layer_idx, side]) ** 0.5

    layers = range(len(cache.layers))
    return {
        name: {word: [relative(name, i, side) for i in layers] for side, word in enumerate(("keys", "values"))}
        for name in configs
    }


def _stored(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return x if spec.is_dense else quantize(x, spec).dequantize(x.dtype)


def _square(x: torch.Tensor) -> float:
    return x.double().square().sum().item()
