"""The size of a cache: bytes per cached element, keys and values together, with everything that the cache holds.

A cache is filled with random keys and values of the model's shapes, because its bytes depend only on shapes and on the
number of tokens. Our caches count themselves (`memory_report`, which a test compares with their tensors); for others
every distinct tensor that the cache refers to is counted.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..cache import QuantizedCache
from ..host import DynamicLayer, cache_inputs
from ..storage import storage_nbytes
from .caches import Candidate

# Long enough that windows of exact tokens weigh little. Half of a peer's window of 128 tokens is decoded.
LONG, _LONG_DECODED = 8192, 64
_SAMPLES = 8


def bytes_per_element(model: PreTrainedModel, candidate: Candidate, context: int, length: int) -> float:
    """Bytes per element for a text of `length` tokens, `context` of them prefilled: the mean while the others decode.

    It is a mean because some caches gather exact tokens and then quantize them at once. Only full-attention layers
    count. Exact tokens count 2 bytes per element, even if the model computes in float32; the reference counts its own
    dtype.
    """
    decoded = length - context
    lengths = sorted({context - -decoded * (i + 1) // _SAMPLES for i in range(_SAMPLES)})
    return sum(_weigh(model, candidate, context, lengths)) / len(lengths)


def bytes_per_element_long(model: PreTrainedModel, candidate: Candidate) -> float:
    """The same after `LONG` tokens."""
    return _weigh(model, candidate, LONG - _LONG_DECODED, [LONG])[0]


def _weigh(model: PreTrainedModel, candidate: Candidate, context: int, lengths: list[int]) -> list[float]:
    """Bytes per element at each of the (rising) lengths."""
    dtype = model.dtype
    shapes = {i: sides for i, (kind, sides) in layer_shapes(model).items() if kind is DynamicLayer}
    if not candidate.weighed_in_model_dtype and dtype.itemsize != 2:
        dtype = torch.float16

    def append(cache: Cache, n: int) -> None:
        for layer_idx, sides in shapes.items():
            key, value = (torch.randn(1, heads, n, d, device=model.device, dtype=dtype) for heads, d in sides)
            cache.update(key, value, layer_idx)

    per_token = sum(heads * head_dim for sides in shapes.values() for heads, head_dim in sides)
    found, cache, held = [], None, 0
    for length in lengths:
        if cache is None or not candidate.weighed_by_token:
            cache = candidate.build(model.config, length)
            held = context if candidate.weighed_by_token else length
            append(cache, held)
        for _ in range(held, length):
            append(cache, 1)
        held = length
        found.append(held_bytes(cache) / (per_token * length))
    return found


def layer_shapes(model: PreTrainedModel) -> dict[int, tuple[type, list[tuple[int, int]]]]:
    """The kind of each layer of the dense cache that holds keys and values, and `(num_kv_heads, head_dim)` of both."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **cache_inputs(model, cache))
    layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    return {i: (type(x), [(y.shape[1], y.shape[3]) for y in (x.keys, x.values)]) for i, x in layers.items()}


def held_bytes(cache: Cache) -> int:
    """Bytes of a cache: those that it reports if it is ours, else those of every distinct storage it refers to."""
    if isinstance(cache, QuantizedCache):
        return cache.memory_report()["total"]
    return tensor_bytes(cache)


def tensor_bytes(cache: Cache) -> int:
    """Bytes of every distinct storage that is reachable from a cache: codes, scales, windows, spare room."""
    return storage_nbytes(cache)
