"""How a layer learns whether its model takes quantized states, and the warnings about it, each given once.

There is no list of models. The first tensors that a layer returns, or the first while the model's attention is ours,
are fresh views tagged with the layer. If those very objects arrive at attention, and nothing else has used them, then
the model does not change states between the cache and attention.

(From transformers 5.24 on, models hand `cache.update` a dictionary that they pass on to attention. It would tell which
layer a call of attention belongs to, but not whether the model changed the states in between, which we need to know.)
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# The routes of cached states to attention, and `window_lost`, which counts crops beyond the exact window.
ROUTES = ("prefill_dense", "decode_fused", "decode_dequantized", "window_lost")

# Why a step reads de-quantized copies.
KEEPS_WEIGHTS = "output_attentions=True (attention weights exist only in dense attention)"

_TAG = "_kvquant_layer"


class Routes(Counter):
    """How often each of `ROUTES` was taken; `in_call` is true while the model that was given the cache runs,
    and `keeps_weights` if it has to return attention weights. `steps` are the updates of that call whose states are
    recorded (see `recorded`)."""

    in_call = keeps_weights = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list = []

    def count(self, route: str) -> None:
        self[route] += 1


class _Fresh(torch.Tensor):
    """States that a layer has just returned; `used` tells whether anything but attention has used them."""

    used: bool

    # The attributes and methods that `QuantizedStates` has too; these do not count as use.
    _shared = frozenset(
        {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")}
        | {torch.Tensor.size, torch.Tensor.to}
    )

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in cls._shared:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, cls):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def tagged(states: torch.Tensor, layer: object) -> torch.Tensor:
    """A fresh view that remembers its layer; see `learn_route`."""
    view = states.view_as(states)
    if not torch.compiler.is_compiling():
        view = view.as_subclass(_Fresh)
        view.used = False
    view.plain = states  # type: ignore[attr-defined]
    setattr(view, _TAG, weakref.ref(layer))
    return view


def learn_route(key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention calls this with its key and value. If they are the very objects that a layer returned from an update,
    and nothing else has used them (to make a mask of the values, say), the layer may return `QuantizedStates` from now
    on. Returns both as plain tensors."""
    layer = layer_of_fresh(key, value)
    if layer is not None and layer.takes_states is None:
        layer.takes_states = True
    return getattr(key, "plain", key), getattr(value, "plain", value)


def layer_of_fresh(key: Any, value: Any) -> Any:
    """The layer that returned these very objects from an update, if nothing else has used them; else None."""
    layers = [tag() for tag in (getattr(key, _TAG, None), getattr(value, _TAG, None)) if tag is not None]
    used = getattr(key, "used", False) or getattr(value, "used", False)
    same_layer = len(layers) == 2 and layers[0] is layers[1]
    return layers[0] if same_layer and not used else None


_switched = 0
_switch_lock = threading.Lock()


@contextmanager
def switched_attention() -> Iterator[None]:
    """Within this context some model's attention is ours, so cached states that do not reach it call for a warning."""
    global _switched
    with _switch_lock:
        _switched += 1
    try:
        yield
    finally:
        with _switch_lock:
            _switched -= 1


def attention_is_switched() -> bool:
    return _switched > 0


_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def say_dequantized(why: str) -> None:
    say_once(f"Attention reads de-quantized copies of the KV cache, because of {why}.")
