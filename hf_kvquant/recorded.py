"""`RecordedStates`: what a decode step returns to a model that has attention code of its own.

BLOOM, MPT, Falcon and others compute `softmax(q @ keys^T * scaling + bias) @ values` themselves, each with its own
transposes, merged heads and casts. The states that they get are tensors that note what is done with them instead of
doing it. As long as that stays within the grammar of attention (see `grammar`), the last product is one call of the
operator, which reads the cache as stored. Every other use, of the attention weights for instance, computes what was
noted on de-quantized copies, with the very functions that the model called; it is counted, and said once. So the code
of an unknown model is slower and never wrong.

Notes are taken in Python (`__torch_function__`); what reaches torch in another way finds numbers
(`__torch_dispatch__`). They hold while the forward call runs that made the states: what is kept longer, weights that a
user asked for, is computed before the cache changes (`Step.close`).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import axes
from .axes import Dims
from .route import say_dequantized
from .states import QuantizedStates, mask_length


class Step:
    """One update of one layer: the states that it made, and what the model has made of them so far.

    Args:
        keys, values: as stored, with the new tokens.
        q_len: how many tokens are new, which are the queries.
        layer: whose update it was.
    """

    def __init__(self, keys: QuantizedStates, values: QuantizedStates, q_len: int, layer: object):
        self.keys, self.values, self.q_len = keys, values, q_len
        self.layer: weakref.ref[Any] = weakref.ref(layer)
        # Whether everything is computed from now on: numbers were written in place, or the call has ended.
        self.is_closed = False
        # Whether anything but the attention function has used the states.
        self.is_used = False
        self._is_counted = False
        self._made: list[weakref.ref] = []

    def recorded(self) -> tuple[RecordedStates, RecordedStates]:
        """Keys and values for the model."""
        pair = []
        for is_keys in (True, False):
            node = Node(self._dequantized, (is_keys,), {})
            pair.append(self.note(States(self, is_keys, self.dims(is_keys)), self.keys.dtype, node))
        keys, values = pair
        return keys, values

    @property
    def columns(self) -> int:
        """How many columns the model gets: those of its mask, see `mask_length`."""
        return mask_length(self.keys.length, self.keys.sliding_window, self.q_len)

    @property
    def is_held(self) -> bool:
        """Whether the model still has something that was made of the states."""
        return any(made() is not None for made in self._made)

    def dims(self, is_keys: bool) -> Dims:
        """How the cache lays out keys or values."""
        batch, heads, _, head_dim = (self.keys if is_keys else self.values).shape
        return axes.named(batch=batch, head=heads, column=self.columns, channel=head_dim)

    def take(self) -> tuple[QuantizedStates, QuantizedStates]:
        """The states themselves, for an attention function that got them as they are. If nothing else has used them,
        the layer may return them at once from the next step on."""
        layer = self.layer()
        if layer is not None and layer.takes_states is None and not self.is_used:
            layer.takes_states = True
        return self.keys, self.values

    def note(self, meaning: Meaning, dtype: torch.dtype, node: Node) -> RecordedStates:
        tensor = RecordedStates(meaning, dtype, self.keys.device, node)
        self._made.append(weakref.ref(tensor))
        return tensor

    def say(self, why: str) -> None:
        """De-quantized copies are about to be read."""
        if not self._is_counted:
            say_dequantized(why)
            self.keys.routes.count("decode_dequantized")
            self._is_counted = True

    def _dequantized(self, is_keys: bool) -> torch.Tensor:
        """A copy, which lives as long as a tensor that was made of it: the next layer needs the memory."""
        states = self.keys if is_keys else self.values
        return states.dequantize(states.position(self.q_len))[:, :, states.length - self.columns :]

    def abandon(self) -> None:
        """Note no more; what is still held has no numbers."""
        self.is_closed = True

    def close(self, why: str = "attention weights that were kept") -> None:
        """Compute what is still held, and note no more."""
        for made in self._made:
            tensor = made()
            if tensor is not None:
                tensor.numbers(why)
        self._made.clear()
        self.is_closed = True


class Meaning:
    """What a recorded tensor is; never changed."""

    step: Step
    dims: Dims

    def but(self, **changes: Any) -> Meaning:
        """The same with other fields; `dataclasses.replace` takes longer than a short kernel."""
        new = object.__new__(type(self))
        new.__dict__ = self.__dict__ | changes
        return new


@dataclass(eq=False)
class States(Meaning):
    """Keys or values of a step, laid out as `dims`; of the KV heads from `heads[0]` to `heads[1]` if that is given,
    and with columns of the model's own behind the cached ones."""

    step: Step
    is_keys: bool
    dims: Dims
    heads: tuple[int, int] | None = None
    more: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all that the cache has, and nothing else."""
        return self.heads is None and self.more is None

    @property
    def is_as_stored(self) -> bool:
        """Whether this is what the cache returned."""
        return self.is_whole and self.dims == self.step.dims(self.is_keys)


@dataclass(eq=False)
class Scores(Meaning):
    """`scaling * query @ keys^T + biases`, with a lowest number where one of the masks `hidden` is True. Biases stand
    with their factor, masks with that number, and both with the dimensions that they broadcast against. `is_shared`:
    another tensor may have the same numbers."""

    step: Step
    query: torch.Tensor
    query_dims: Dims
    dims: Dims
    scaling: float
    biases: tuple[tuple[torch.Tensor, Dims, float], ...] = ()
    hidden: tuple[tuple[torch.Tensor, Dims, float], ...] = ()
    is_shared: bool = False


@dataclass(eq=False)
class Weights(Meaning):
    """The softmax of scores over their columns."""

    step: Step
    scores: Scores
    dims: Dims


class Node:
    """How a recorded tensor is computed: a function and its arguments, with nodes for recorded tensors."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        self.function, self.args, self.kwargs = function, args, kwargs
        self.numbers: torch.Tensor | None = None

    def compute(self) -> torch.Tensor:
        if self.numbers is None:
            args, kwargs = mapped(self.args, Node, Node.compute), mapped(self.kwargs, Node, Node.compute)
            self.numbers = self.function(*args, **kwargs)
        return self.numbers


class RecordedStates(torch.Tensor):
    """A tensor of known shape and dtype: `meaning` says what it is, `node` how its numbers are made, if they are."""

    # A `Meaning`; the grammar asks for its class first.
    meaning: Any
    node: Node
    _shape: torch.Size
    _dtype: torch.dtype
    _device: torch.device

    @staticmethod
    def __new__(cls, meaning: Meaning, dtype: torch.dtype, device: torch.device, node: Node) -> RecordedStates:
        shape = torch.Size(axes.shape(meaning.dims))
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.meaning, tensor.node = meaning, node
        tensor._shape, tensor._dtype, tensor._device = shape, dtype, device
        return tensor

    # A tensor's own properties would ask `__torch_function__`.
    shape = property(lambda self: self._shape)
    ndim = property(lambda self: len(self._shape))
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)

    def numbers(self, why: str) -> torch.Tensor:
        """What the model's own functions give on de-quantized copies, which are read because of `why`.

        Raises:
            RuntimeError: the states are of a call that was interrupted; the cache may have changed since.
        """
        if self.node.numbers is not None:
            return self.node.numbers
        if self.meaning.step.is_closed:
            raise RuntimeError("cached states of a forward call that was interrupted cannot be read after it")
        self.meaning.step.say(why)
        with torch._C.DisableTorchFunctionSubclass():
            return self.node.compute()

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        rule = RULES.get(function)
        result = None
        if rule is not None and not any(x.meaning.step.is_closed for x in recorded_in(args, kwargs)):
            try:
                result = rule(*args, **kwargs)
            except TypeError:
                # Arguments that the rule does not have: torch does what they say, or says what is wrong with them.
                result = None
        return _computed(function, args, kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a builtin without `function`
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _computed(function, args, kwargs or {})


RULES: dict[Callable, Callable] = {}
"""What is noted of a function: its arguments -> a recorded tensor, the output of attention, or None."""

# What a tensor says without its numbers.
_ABOUT = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in ("is_cuda", "requires_grad")]
    + [
        getattr(torch.Tensor, name)
        for name in ("size", "dim", "numel", "is_floating_point", "get_device", "__len__", "__hash__")
    ]
)
_WRITES = re.compile(r".*[^_]_|__i(?!nvert)\w+__|__setitem__")


def mapped(arguments: Any, kind: type, function: Callable) -> Any:
    """Arguments of a call, with `function` of those of a kind (torch's own maps take longer than a short kernel)."""
    own = type(arguments)
    if own is kind:
        return function(arguments)
    if own is tuple or own is list:
        return own([mapped(x, kind, function) for x in arguments])
    if own is dict:
        return {name: mapped(x, kind, function) for name, x in arguments.items()}
    return arguments


def recorded_in(*arguments: Any) -> list[RecordedStates]:
    found: list[RecordedStates] = []
    for argument in arguments:
        kind = type(argument)
        if kind is RecordedStates:
            found.append(argument)
        elif kind is tuple or kind is list:
            found += recorded_in(*argument)
        elif kind is dict and argument:
            found += recorded_in(*argument.values())
    return found


def _computed(function: Callable, args: tuple, kwargs: dict) -> object:
    """The function, of numbers."""
    name = getattr(function, "__name__", str(function)).partition(".")[0]
    why = f"the model's own use of cached states in {name}()"
    if torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, torch.Tensor)):
        why = "queries that require grad"
    steps = {x.meaning.step for x in recorded_in(args, kwargs)}
    for step in steps:
        step.is_used = True
        if _WRITES.fullmatch(name) or "out" in kwargs:
            # What was noted before is computed before it is overwritten.
            step.close(why)
    args, kwargs = (mapped(x, RecordedStates, lambda x: x.numbers(why)) for x in (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)
