"""Lets `torch.export` take a static cache as an argument: its tensors are inputs that the program writes to.

    hf_kvquant.register_for_export()
    program = torch.export.export(Step(model), (ids, cache))
    logits = program.module()(ids, cache)  # and the cache has one token more

It has to be asked for, as with transformers' own caches: once a cache is a pytree node, everything that uses pytrees
takes it apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch.utils import _pytree as pytree

from .cache import QuantizedCache
from .host import StaticLayer
from .static import StaticQuantizedLayer


def register_for_export() -> None:
    """Let `torch.export` take a static `QuantizedCache` as an argument; a second call changes nothing.

    A prompt must have filled the cache before. Its layers may keep their state in tensors only: a model with linear
    layers, or with sliding ones that are not quantized, is refused when it is exported.
    """
    if QuantizedCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            QuantizedCache, _flatten, _unflatten, serialized_type_name="hf_kvquant.QuantizedCache",
            flatten_with_keys_fn=_flatten_with_keys,
        )  # fmt: skip


class _Empty:
    """A cache with other objects in place of its tensors; two are equal if their caches have the same form."""

    def __init__(self, cache: QuantizedCache, tensors: list[torch.Tensor]):
        self.places = [object() for _ in tensors]
        self.cache = copy.deepcopy(cache, _replacing(tensors, self.places, cache))
        forms = tuple((tuple(x.shape), x.dtype, x.device) for x in tensors)
        self.form = (cache.kv_config, tuple(type(layer) for layer in cache.layers), forms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Empty) and self.form == other.form

    def __hash__(self) -> int:
        return hash(self.form)


def _replacing(old: list, new: list, cache: QuantizedCache) -> dict:
    """The memo for `copy.deepcopy`: objects to take instead of copies."""
    return {id(cache._config): cache._config} | {id(a): b for a, b in zip(old, new)}


def _flatten(cache: QuantizedCache) -> tuple[list[torch.Tensor], _Empty]:
    for layer_idx, layer in enumerate(cache.layers):
        # transformers' own sliding layers keep their length in a Python number.
        is_native = isinstance(layer, StaticLayer) and not layer.is_sliding
        is_static = isinstance(layer, StaticQuantizedLayer) or is_native
        if not is_static or not layer.is_initialized:
            raise ValueError(
                f"layer {layer_idx}: a {type(layer).__name__} cannot be exported; expected a static cache that a "
                "prompt has filled, without layers of transformers' own that slide"
            )
        if isinstance(layer, StaticQuantizedLayer):
            # The length is read from the device, where the program will change it.
            layer._length = None
    tensors = list({id(x): x for layer in cache.layers for x in _tensors(vars(layer))}.values())
    return tensors, _Empty(cache, tensors)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
    elif type(value).__module__.partition(".")[0] == __package__ and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _flatten_with_keys(cache: QuantizedCache) -> tuple[list, _Empty]:
    tensors, empty = _flatten(cache)
    return [(pytree.SequenceKey(i), x) for i, x in enumerate(tensors)], empty


def _unflatten(tensors: Iterable[torch.Tensor], empty: _Empty) -> QuantizedCache:
    return copy.deepcopy(empty.cache, _replacing(empty.places, list(tensors), empty.cache))
