"""Checks the content of a saved cache against patterns that a fresh layer of the same config makes.

A pattern has the structure of the values that fit it: dicts, lists and tuples of patterns, and in them

    a type           a value of exactly that type
    a range          an integer in the range
    a frozenset      a value that fits one of its patterns
    a meta tensor    a tensor of its shape and dtype, with any elements
    `Bounds`         a tensor whose elements lie between those of two tensors
    anything else    an equal value of the same type

A pattern is made for the sizes that a state claims, so all tensors of the state have to agree on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import message
from .host import GENERATION_STATE, CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

BOOL = frozenset({False, True})
# Far more than any cache holds, yet products of such sizes do not overflow.
COUNT = range(1 << 40)
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


@dataclass(frozen=True, eq=False)
class Bounds:
    """A tensor like `low` and `high`, with elements from `low` to `high`. `fills`: each row holds increasing integers,
    and after them only -1. `zeros`: it may begin with several zeros."""

    low: torch.Tensor
    high: torch.Tensor
    fills: bool = False
    zeros: bool = False

    def holds(self, tensor: torch.Tensor) -> bool:
        tensor = tensor.cpu()
        if (tensor < self.low).any() or (tensor > self.high).any():
            return False
        if not self.fills:
            return True
        left, right = tensor[..., :-1], tensor[..., 1:]
        increases = (right > left) | (self.zeros & (right == 0))
        return bool(((right == -1) | (left >= 0) & increases).all())


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A pattern for tensors of this shape and dtype."""
    return torch.empty(shape, dtype=dtype, device="meta")


def misfit(found: object, pattern: object, where: str) -> str | None:
    """A description of the first place where `found` does not fit the pattern; None if it fits."""
    if isinstance(pattern, dict):
        if type(found) is not dict or found.keys() != pattern.keys():
            has = sorted(map(str, found)) if isinstance(found, dict) else found
            return _differs(where, has, sorted(map(str, pattern)))
        return _first(misfit(found[key], each, f"{where}.{key}") for key, each in pattern.items())
    if isinstance(pattern, (list, tuple)):
        if type(found) is not type(pattern) or len(found) != len(pattern):
            return _differs(where, found, pattern)
        return _first(misfit(x, each, f"{where}.{i}") for i, (x, each) in enumerate(zip(found, pattern)))
    if isinstance(pattern, frozenset):
        fits = any(misfit(found, each, where) is None for each in pattern)
    elif isinstance(pattern, (torch.Tensor, Bounds)):
        like = pattern.low if isinstance(pattern, Bounds) else pattern
        if not isinstance(found, torch.Tensor) or found.shape != like.shape or found.dtype != like.dtype:
            fits = False
        elif isinstance(pattern, Bounds):
            fits = pattern.holds(found)
        else:
            fits = like.is_meta or torch.equal(found.cpu(), like.cpu())
    elif isinstance(pattern, type):
        fits = type(found) is pattern
    elif isinstance(pattern, range):
        fits = type(found) is int and found in pattern
    else:
        fits = type(found) is type(pattern) and found == pattern
    return None if fits else _differs(where, found, pattern)


def _first(misfits: Iterable[str | None]) -> str | None:
    return next((each for each in misfits if each is not None), None)


def _differs(where: str, found: object, pattern: object) -> str:
    return f"{where} is {_told(found)}; expected {_told(pattern)}"


def _told(value: object) -> str:
    """The text for a value or a pattern in a message."""
    if isinstance(value, Bounds):
        return f"{_told(value.low)} with elements from {value.low.tolist()} to {value.high.tolist()}"[:300]
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype}" + ("" if value.ndim or value.is_meta else f" ({value.item()})")
    if isinstance(value, (frozenset, type)):
        names = [
            getattr(each, "__name__", repr(each)) for each in (value if isinstance(value, frozenset) else [value])
        ]
        return " or ".join(sorted(names))
    if isinstance(value, range):
        return f"an integer from {value.start} to {value.stop - 1}"
    return message.told(value)


def check(found: object, pattern: Callable[[], object], where: str) -> None:
    """Compare a value with a pattern.

    Raises:
        ValueError: the value does not fit, or making the pattern fails, because no layer has such sizes.
    """
    try:
        told = misfit(found, pattern(), where)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"{where} cannot be the state of such a layer ({type(error).__name__}: {str(error)[:200]})"
    if told is not None:
        raise ValueError(told)


def model_state(state: Mapping) -> dict:
    """The pattern for the state of a generation that models keep outside of the cache."""
    return {
        name: frozenset({None, COUNT, meta(*getattr(value, "shape", ()), dtype=torch.int64)})
        for name, value in state.items()
        if name.rpartition(".")[2] in GENERATION_STATE
    }


def native(layer: object, state: Mapping) -> dict:
    """The pattern for the attributes of one of transformers' own layers.

    Args:
        layer: a fresh layer of the same config.
        state: the attributes to compare; the shapes of its tensors determine the pattern's.
    """
    fresh = copy.deepcopy(layer)
    if isinstance(fresh, LinearAttentionLayer):
        _initialise_linear(fresh, state)
    states = {}
    if isinstance(fresh, CacheLayerMixin) and state["is_initialized"] is True:
        (batch, heads, columns, k_dim), v_dim = state["keys"].shape, state["values"].shape[-1]
        dtype = _float(state["keys"])
        fresh.lazy_initialization(*(meta(batch, heads, columns, dim, dtype=dtype) for dim in (k_dim, v_dim)))
        columns = getattr(fresh, "max_cache_len", columns)
        states = {
            "keys": meta(batch, heads, columns, k_dim, dtype=dtype),
            "values": meta(batch, heads, columns, v_dim, dtype=dtype),
        }
    expected = vars(fresh) | {name: x for name, x in vars(layer).items() if isinstance(x, torch.Tensor)} | states
    return expected | {name: rule(fresh, state) for name, rule in _CHANGES.items() if name in expected}


def linear(layer: LinearAttentionLayer, state: Mapping) -> dict:
    """The pattern for the linear-attention attributes of a layer that has others too."""
    return native(LinearAttentionLayer(layer.number_of_states), state)


def _initialise_linear(fresh: LinearAttentionLayer, state: Mapping) -> None:
    for name in ("conv_states", "recurrent_states"):
        for i, saved in state[name].items():
            if saved is not None:
                like: dict[str, Any] = {name: meta(*saved.shape, dtype=_float(saved))}
                LinearAttentionLayer.lazy_initialization(fresh, **like, state_idx=i)


def _float(states: torch.Tensor) -> torch.dtype:
    if states.dtype not in FLOATS or states.ndim < 2 or not states.numel():
        raise ValueError(f"states of {states.dtype} with shape {tuple(states.shape)}")
    return states.dtype


def _dtypes(fresh: object, state: Mapping) -> object:
    """The allowed dtypes: a layer with both kinds of attention keeps the dtype of the one that ran last."""
    linear = state["conv_states"].values() if isinstance(fresh, LinearAttentionLayer) else ()
    return frozenset(x.dtype for x in (state.get("keys"), *linear) if x is not None) or None


def _cumulative_length(fresh: Any, state: Mapping) -> object:
    """The number of tokens that may have passed, given the states that are kept of them."""
    if isinstance(fresh, DynamicSlidingWindowLayer):
        kept, most = (state["keys"].shape[2] if fresh.is_initialized else 0), fresh.sliding_window - 1
        if kept < most or not most:
            return kept
        return range(kept if state["record_past"] is True or kept == most else COUNT.stop, COUNT.stop)
    tokens = state.get("cumulative_length_int")
    if tokens is not None and tokens <= fresh.max_cache_len:
        return torch.tensor(tokens)
    least, most = (1, fresh.max_cache_len) if fresh.is_initialized else (0, 0)
    # Once the window has overflowed, only the integer counts on.
    return Bounds(torch.tensor(least if tokens is None else 0), torch.tensor(most))


# Patterns for attributes that change with use, other than keys, values and linear states.
_CHANGES: dict[str, Callable[[Any, Mapping], object]] = {
    "conv_kernel_size": lambda fresh, state: {
        i: COUNT[1:] if size is not None and state["record_past"] is True else size
        for i, size in fresh.conv_kernel_size.items()
    },
    "cumulative_length": _cumulative_length,
    "cumulative_length_int": lambda fresh, state: COUNT[1:] if fresh.is_initialized else 0,
    "device": lambda fresh, state: None if fresh.device is None else torch.device,
    "dtype": _dtypes,
    "has_previous_state": lambda fresh, state: dict.fromkeys(fresh.has_previous_state, BOOL),
    "record_past": lambda fresh, state: BOOL,
}
