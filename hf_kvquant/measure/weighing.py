"""What a cache weighs: bytes per cached number, keys and values together, everything that the cache holds included.

A cache is filled with random keys and values of the model's shapes and asked for its bytes: bytes depend on shapes and
on the number of tokens alone. Ours count themselves (`memory_report`, held to their tensors by a test); of the others
every distinct tensor is counted that the cache refers to.
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
    """Bytes per number of a text of `length` tokens, the first `context` prefilled: the mean while the others decode.

    The mean, because some caches gather exact tokens and then quantize them at once. Only full-attention layers count.
    Exact tokens weigh 16 bits (2 bytes) a number, also if the model computes in float32; the reference weighs what it
    does in the model's dtype.
    """
    decoded = length - context
    lengths = sorted({context - -decoded * (i + 1) // _SAMPLES for i in range(_SAMPLES)})
    return sum(_weigh(model, candidate, context, lengths)) / len(lengths)


def bytes_per_element_long(model: PreTrainedModel, candidate: Candidate) -> float:
    """The same after `LONG` tokens."""
    return _weigh(model, candidate, LONG - _LONG_DECODED, [LONG])[0]


def _weigh(model: PreTrainedModel, candidate: Candidate, context: int, lengths: list[int]) -> list[float]:
    """Bytes per number at each of the (rising) lengths."""
    dtype, shapes = model.dtype, _shapes(model)
    if not candidate.weighed_in_model_dtype and dtype.itemsize != 2:
        dtype = torch.float16

    def append(cache: Cache, n: int) -> None:
        for layer_idx, sides in shapes.items():
            states = [torch.randn(1, heads, n, d, device=model.device, dtype=dtype) for heads, d in sides]
            cache.update(*states, layer_idx)

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


def _shapes(model: PreTrainedModel) -> dict[int, list[tuple[int, int]]]:
    """`(num_kv_heads, head_dim)` of keys and of values of each full-attention layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **cache_inputs(model, cache))
    layers = {i: layer for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
    return {i: [(x.shape[1], x.shape[3]) for x in (layer.keys, layer.values)] for i, layer in layers.items()}


def held_bytes(cache: Cache) -> int:
    """Bytes of a cache: as it reports them if it is ours, else of every distinct storage it refers to."""
    if isinstance(cache, QuantizedCache):
        return cache.memory_report()["total"]
    return tensor_bytes(cache)


def tensor_bytes(cache: Cache) -> int:
    """Bytes of every distinct storage that is reachable from a cache: codes, scales, windows, spare room."""
    return storage_nbytes(cache)
