"""The grammar of attention: which functions of recorded states are noted instead of computed.

    states   = transpose | view | reshape | permute | expand | repeat | chunk | cast (states)
             | cat (states, columns of the model's own)
    scores   = query @ states^T | scores * number | scores + bias | masked_fill (scores, mask, lowest) | view | cast
    weights  = softmax (scores) | dropout that is off | view | cast
    output   = weights @ states  |  scaled_dot_product_attention (query, states, states)

A rule returns a `RecordedStates` that says what the result is, the output, or None where the function, or an argument
of it, is not in the grammar. It never looks at elements of the cache, only at single values that the model passes:
the value that is filled in must hide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from . import axes
from .axes import Dims
from .calls import MASK, Call, lead
from .recorded import RULES, Meaning, Node, RecordedStates, Scores, States, Step, Weights, mapped
from .route import say_once
from .states import QuantizedStates, is_autocast


def recorded(
    keys: QuantizedStates, values: QuantizedStates, q_len: int, layer: object
) -> tuple[RecordedStates, RecordedStates, Step]:
    """Keys and values of a decode step for a model with attention code of its own, and the step itself."""
    step = Step(keys, values, q_len, layer)
    return (*step.recorded(), step)


def _rule(*functions: Callable) -> Callable:
    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _noted(
    meaning: Meaning, dtype: torch.dtype, function: Callable, *args: object, **kwargs: object
) -> RecordedStates:
    """The recorded result of `function(*args, **kwargs)`."""
    return meaning.step.note(meaning, dtype, Node(function, _nodes(args), _nodes(kwargs)))


def _nodes(arguments: Any) -> Any:
    return mapped(arguments, RecordedStates, lambda x: x.node)


def _at(x: torch.Tensor, dim: int) -> int:
    """The number of a dimension from the front.

    Raises:
        TypeError: there is none.
    """
    if not -x.ndim <= dim < x.ndim:
        raise TypeError
    return dim % x.ndim


def _sizes(sizes: tuple) -> Any:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _is(meaning: type, x: Any) -> bool:
    return isinstance(x, RecordedStates) and isinstance(x.meaning, meaning)


def _is_given(x: Any) -> bool:
    """A tensor of the model's own, which needs no gradient from attention."""
    is_tensor = isinstance(x, torch.Tensor) and not isinstance(x, RecordedStates)
    return is_tensor and not (x.requires_grad and torch.is_grad_enabled())


def _number(x: Any) -> float | None:
    """A number, also one that stands in a tensor."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    return float(x) if _is_given(x) and x.ndim == 0 else None


# ---- the same elements in another layout ----------------------------------------------------------------------------


def _laid_out(x: RecordedStates, dims: Dims | None, function: Callable, *args: object) -> RecordedStates | None:
    if dims is None or getattr(x.meaning, "more", None) is not None:
        return None
    x.meaning.step.is_used = True
    if _is(Scores, x):
        x.meaning = x.meaning.but(is_shared=True)
    return _noted(x.meaning.but(dims=dims), x.dtype, function, x, *args)


@_rule(torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes, torch.swapaxes)
def _(x, dim0, dim1):
    order = list(range(x.ndim))
    order[_at(x, dim0)], order[_at(x, dim1)] = _at(x, dim1), _at(x, dim0)
    return _laid_out(x, axes.permute(x.meaning.dims, order), torch.transpose, dim0, dim1)


@_rule(torch.Tensor.mT.__get__)  # type: ignore[attr-defined]  # a property of the class
def _(x):
    return x.transpose(-2, -1)


@_rule(torch.Tensor.permute, torch.permute)
def _(x, *dims):
    dims = _sizes(dims)
    return _laid_out(x, axes.permute(x.meaning.dims, [_at(x, dim) for dim in dims]), torch.permute, dims)


@_rule(torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
def _(x, *shape):
    shape = _sizes(shape)
    if not all(isinstance(size, int) for size in shape):
        return None
    return _laid_out(x, axes.reshape(x.meaning.dims, shape), torch.reshape, shape)


@_rule(torch.Tensor.unsqueeze, torch.unsqueeze)
def _(x, dim):
    at, dims = dim % (x.ndim + 1), x.meaning.dims
    return _laid_out(x, (*dims[:at], (), *dims[at:]), torch.unsqueeze, dim)


@_rule(torch.Tensor.flatten, torch.flatten)
def _(x, start_dim=0, end_dim=-1):
    return x.reshape(*x.shape[: _at(x, start_dim)], -1, *x.shape[_at(x, end_dim) + 1 :])


@_rule(torch.Tensor.__getitem__)
def _(x, index):
    return _laid_out(x, axes.index(x.meaning.dims, index), torch.Tensor.__getitem__, index)


@_rule(torch.Tensor.expand)
def _(x, *sizes):
    sizes = _sizes(sizes)
    return _laid_out(x, axes.expand(x.meaning.dims, sizes), torch.Tensor.expand, sizes)


@_rule(torch.Tensor.repeat)
def _(x, *counts):
    counts = _sizes(counts)
    return _laid_out(x, axes.repeat(x.meaning.dims, counts), torch.Tensor.repeat, counts)


@_rule(torch.Tensor.repeat_interleave, torch.repeat_interleave)
def _(x, repeats, dim):
    if not isinstance(repeats, int) or repeats < 1:
        return None
    dims = axes.interleave(x.meaning.dims, repeats, _at(x, dim))
    return _laid_out(x, dims, torch.repeat_interleave, repeats, dim)


@_rule(torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.clone)
def _(x):
    return _laid_out(x, x.meaning.dims, torch.clone)


@_rule(torch.Tensor.chunk, torch.chunk)
def _(x, chunks, dim=0):
    heads, at = x.meaning.step.keys.shape[1], _at(x, dim)
    is_values = _is(States, x) and x.meaning.is_whole and not x.meaning.is_keys
    if not is_values or x.meaning.dims[at] != (("head", heads),) or heads % chunks:
        return None
    x.meaning.step.is_used = True
    size, dims = heads // chunks, list(x.meaning.dims)
    (dims[at],) = axes.named(head=size)
    meaning = x.meaning.but(dims=tuple(dims))
    return tuple(
        _noted(meaning.but(heads=(i * size, (i + 1) * size)), x.dtype, torch.narrow, x, at, i * size, size)
        for i in range(chunks)
    )


@_rule(torch.cat)
def _(tensors, dim=0):
    x, *more = tensors
    if not _is(States, x) or not x.meaning.is_as_stored or not more or not all(map(_is_given, more)):
        return None
    if _at(x, dim) != 2 or any((t.dtype, t.device) != (x.dtype, x.device) for t in more):
        return None
    batch, heads, columns, channels = axes.shape(x.meaning.dims)
    behind = torch.cat(more, dim=2)
    if behind.shape != (batch, heads, behind.shape[2], channels):
        return None
    x.meaning.step.is_used = True
    dims = axes.named(batch=batch, head=heads, column=columns + behind.shape[2], channel=channels)
    return _noted(x.meaning.but(dims=dims, more=behind), x.dtype, torch.cat, tensors, dim)


@_rule(torch.Tensor.to)
def _(x, *args, **kwargs):
    if not isinstance(x, RecordedStates):
        like = args[0]
        return x.to(like.device, like.dtype, *args[1:], **kwargs)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return None if memory_format is not None else _cast(x, dtype or x.dtype, device or x.device)


@_rule(torch.Tensor.type_as)
def _(x, other):
    return _cast(x, other.dtype, other.device) if isinstance(x, RecordedStates) else x.to(other.device, other.dtype)


@_rule(torch.Tensor.float)
def _(x):
    return _cast(x, torch.float32, x.device)


def _cast(x: RecordedStates, dtype: torch.dtype, device: torch.device) -> RecordedStates | None:
    if device != x.device or not dtype.is_floating_point:
        return None
    if dtype == x.dtype:
        return x
    x.meaning.step.is_used = True
    return _noted(x.meaning, dtype, torch.Tensor.to, x, dtype)


@_rule(torch.Tensor.expand_as)
def _(x, other):
    return None if isinstance(x, RecordedStates) else x.expand(other.shape)


# Columns that are de-quantized at once; every block length divides it.
_SLICE = 1024


@_rule(F.linear)
def _(input, weight, bias=None):
    """A few elements for each token, from which a model makes a mask or a bias, as Doge does from values. They are
    computed slice by slice, without a copy of all states."""
    if not _is(States, input) or not input.meaning.is_whole or not _is_given(weight):
        return None
    step, is_keys = input.meaning.step, input.meaning.is_keys
    states = step.keys if is_keys else step.values
    batch, heads, stored, channels = states.shape
    columns = step.columns
    as_rows = axes.reshape(axes.named(batch=batch, column=columns, head=heads, channel=channels), (batch, columns, -1))
    if input.meaning.dims != as_rows or len(weight) > heads or is_autocast(input) or input.dtype != states.dtype:
        return None
    step.is_used = True
    say_once(
        "This model makes a mask or a bias of its cached states, so each step de-quantizes them for that, slice by "
        "slice; attention reads them as they are stored."
    )
    first, found = states.position(step.q_len), []
    for start in range(0, stored, _SLICE):
        piece = states.dequantize(first, slice(start, start + _SLICE))
        found.append(F.linear(piece.transpose(1, 2).flatten(2), weight, bias))
    return torch.cat(found, dim=1)[:, stored - columns :]


# ---- scores ---------------------------------------------------------------------------------------------------------


def _scored(x: RecordedStates, dtype: torch.dtype, changes: dict, function: Callable, *args: object) -> RecordedStates:
    """Scores with other values."""
    return _noted(x.meaning.but(is_shared=False, **changes), dtype, function, *args)


def _written(x: RecordedStates, result: RecordedStates | None) -> RecordedStates | None:
    """`x`, which becomes `result` in place, where no other tensor has the same numbers."""
    if result is None or x.meaning.is_shared or x.node.numbers is not None or result.dtype != x.dtype:
        return None
    x.meaning, x.node = result.meaning, result.node
    return x


def _in_either_order(a: Any, b: Any) -> tuple:
    return (a, b) if isinstance(a, RecordedStates) else (b, a)


def _scaled(x: Any, factor: float | None, function: Callable, *args: object) -> RecordedStates | None:
    if not _is(Scores, x) or factor is None or not 0 < factor < math.inf:
        return None
    biases = tuple((bias, dims, each * factor) for bias, dims, each in x.meaning.biases)
    changes = {"scaling": x.meaning.scaling * factor, "biases": biases}
    return _scored(x, x.dtype, changes, function, *args)


@_rule(torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _(a, b):
    x, factor = _in_either_order(a, b)
    return _scaled(x, _number(factor), torch.mul, a, b)


@_rule(torch.Tensor.div, torch.div, torch.Tensor.__truediv__, torch.true_divide)
def _(x, divisor):
    number = _number(divisor)
    return _scaled(x, 1 / number if number else None, torch.div, x, divisor)


@_rule(torch.Tensor.mul_, torch.Tensor.__imul__)
def _(x, factor):
    return _written(x, _scaled(x, _number(factor), torch.mul, x, factor))


@_rule(torch.Tensor.div_, torch.Tensor.__itruediv__)
def _(x, divisor):
    number = _number(divisor)
    return _written(x, _scaled(x, 1 / number if number else None, torch.div, x, divisor))


def _biased(x: Any, bias: Any, factor: float, dtype: torch.dtype, function: Callable, *args, **kwargs):
    fits = _is(Scores, x) and _is_given(bias) and axes.broadcasts(bias.shape, x.meaning.dims)
    if not fits or not bias.is_floating_point():
        return None
    meaning = x.meaning.but(is_shared=False, biases=(*x.meaning.biases, (bias, x.meaning.dims, factor)))
    return _noted(meaning, dtype, function, *args, **kwargs)


@_rule(torch.Tensor.add, torch.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _(a, b):
    x, bias = _in_either_order(a, b)
    dtype = torch.promote_types(x.dtype, bias.dtype) if _is_given(bias) and bias.ndim else x.dtype
    return _biased(x, bias, 1.0, dtype, torch.add, a, b)


@_rule(torch.Tensor.add_, torch.Tensor.__iadd__)
def _(x, bias):
    return _written(x, _biased(x, bias, 1.0, x.dtype, torch.add, x, bias))


def _hidden(x: Any, mask: Any, value: Any) -> tuple | None:
    """What is hidden when the mask is filled in with a value, if that hides."""
    fits = _is(Scores, x) and _is_given(mask) and mask.dtype == torch.bool
    if not fits or not axes.broadcasts(mask.shape, x.meaning.dims):
        return None
    number = _number(value)
    if number is None or number > torch.finfo(x.dtype).min:
        return None
    return (*x.meaning.hidden, (mask, x.meaning.dims, number))


@_rule(torch.Tensor.masked_fill, torch.masked_fill)
def _(x, mask, value):
    if _is(Weights, x):
        # What is hidden for good has no weight already.
        is_known = any(
            dims == x.meaning.dims and known.shape == mask.shape and torch.equal(known, mask)
            for known, dims, number in x.meaning.scores.hidden
            if number == -math.inf
        )
        return _noted(x.meaning, x.dtype, torch.masked_fill, x, mask, value) if is_known and not value else None
    hidden = _hidden(x, mask, value)
    return None if hidden is None else _scored(x, x.dtype, {"hidden": hidden}, torch.masked_fill, x, mask, value)


@_rule(torch.Tensor.masked_fill_)
def _(x, mask, value):
    hidden = _hidden(x, mask, value)
    if hidden is None:
        return None
    return _written(x, _scored(x, x.dtype, {"hidden": hidden}, torch.masked_fill, x, mask, value))


@_rule(torch.where)
def _(condition, x, value):
    hidden = _hidden(x, ~condition, value) if _is_given(condition) and condition.dtype == torch.bool else None
    return None if hidden is None else _scored(x, x.dtype, {"hidden": hidden}, torch.where, condition, x, value)


@_rule(torch.max, torch.maximum, torch.Tensor.maximum)
def _(x, lowest):
    """A lower bound under which everything is hidden."""
    number = _number(lowest) if _is(Scores, x) and _is_given(lowest) else None
    if number is None or number > torch.finfo(x.dtype).min:
        return None
    return _scored(x, x.dtype, {}, torch.maximum, x, lowest)


@_rule(F.softmax, torch.softmax, torch.Tensor.softmax)
def _(input, dim, _stacklevel=3, dtype=None):
    if not _is(Scores, input) or _at(input, dim) != input.ndim - 1:
        return None
    meaning = input.meaning
    if dtype is None:
        dtype = torch.float32 if is_autocast(input) else input.dtype
    return _noted(Weights(meaning.step, meaning, meaning.dims), dtype, torch.softmax, input, dim, dtype)


@_rule(F.dropout)
def _(input, p=0.5, training=True, inplace=False):
    if (training and p) or inplace or not _is(Weights, input):
        return None
    return _noted(input.meaning, input.dtype, torch.clone, input)


# ---- products -------------------------------------------------------------------------------------------------------


def _query_keys(query: Any, keys: Any, scaling: float, function: Callable, *args, **kwargs):
    """The scores `query @ keys`, the keys being transposed."""
    if not (_is(States, keys) and _is_given(query) and query.is_floating_point() and min(query.ndim, keys.ndim) >= 3):
        return None
    meaning, cast = keys.meaning, is_autocast(query)
    step, (channel, columns) = meaning.step, meaning.dims[-2:]
    is_transposed = columns == (("column", step.columns),) and channel == (("channel", step.keys.head_dim),)
    if not meaning.is_keys or meaning.more is not None or not is_transposed:
        return None
    heads = lead(query.shape[:-2], meaning.dims[:-2])
    fits = tuple(query.shape[-2:]) == (step.q_len, step.keys.head_dim) and (cast or query.dtype == keys.dtype)
    if heads is None or not fits:
        return None
    (row,) = axes.named(query=step.q_len)
    scores = Scores(step, query, (*heads, row, channel), (*heads, row, columns), scaling)
    return _noted(scores, step.keys.dtype if cast else keys.dtype, function, *args, **kwargs)


def _weights_values(weights: Any, values: Any) -> torch.Tensor | None:
    """The output `weights @ values`, by the operator."""
    if not (_is(Weights, weights) and _is(States, values) and (is_autocast(weights) or weights.dtype == values.dtype)):
        return None
    scores = weights.meaning.scores
    call = Call.of_weights(scores, weights.meaning.dims, values.meaning)
    if call is None or call.more is not None:
        return None
    output = call(scores.query, _mask(scores), scaling=scores.scaling)
    return output.to(scores.step.values.dtype if is_autocast(weights) else values.dtype)


def _mask(scores: Scores) -> torch.Tensor | None:
    """What was added and hidden, as the operator takes it."""
    for_good = [axes.arrange(mask, dims, MASK) for mask, dims, value in scores.hidden if value == -math.inf]
    almost = [axes.arrange(mask, dims, MASK) for mask, dims, value in scores.hidden if value != -math.inf]
    mask = None
    for bias, dims, factor in scores.biases:
        bias = axes.arrange(bias, dims, MASK)
        bias = bias if factor == 1 else bias * factor
        mask = bias if mask is None else mask + bias
    if almost:
        zero = torch.zeros((), device=scores.query.device) if mask is None else mask
        mask = torch.where(reduce(torch.logical_or, almost), torch.finfo(zero.dtype).min, zero)
    if mask is None:
        return ~reduce(torch.logical_or, for_good) if for_good else _all_columns(scores.step, scores.query.device)
    mask = _finite(mask)
    if for_good:
        mask = torch.where(reduce(torch.logical_or, for_good), torch.finfo(mask.dtype).min, mask)
    return mask.expand(*mask.shape[:-1], scores.step.columns)


def _finite(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask that leaves no weight where it has the lowest numbers, but gives all columns the same weight
    where it has nothing else, as a softmax does: the operator gives such rows none."""
    return mask.clamp(min=torch.finfo(mask.dtype).min / 2)


def _all_columns(step: Step, device: torch.device) -> torch.Tensor | None:
    """The mask of code that hides nothing; the operator without one is causal."""
    return None if step.q_len == 1 else torch.ones(1, 1, 1, step.columns, dtype=torch.bool, device=device)


@_rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
def _(a, b):
    if isinstance(a, RecordedStates):
        return _weights_values(a, b)
    return _query_keys(a, b, 1.0, torch.matmul, a, b)


@_rule(torch.baddbmm, torch.Tensor.baddbmm)
def _(input, batch1, batch2, *, beta=1, alpha=1):
    if isinstance(alpha, torch.Tensor) or not alpha > 0:
        return None
    scores = _query_keys(batch1, batch2, float(alpha), torch.baddbmm, input, batch1, batch2, beta=beta, alpha=alpha)
    if scores is None or beta == 0:
        return scores
    if not (_is_given(input) and input.is_floating_point() and axes.broadcasts(input.shape, scores.meaning.dims)):
        return None
    scores.meaning = scores.meaning.but(biases=((input, scores.meaning.dims, float(beta)),))
    return scores


@_rule(torch.einsum)
def _(equation, *operands):
    a, b = _sizes(operands)
    found = re.fullmatch(r"(\w*)(\w)(\w),(\w*)(\w)(\w)->(\w*)(\w)(\w)", equation.replace(" ", ""))
    if found is None:
        return None
    batch, row, inner, batch_of_b, first, second, batch_of_result, left, right = found.groups()
    if not (batch == batch_of_b == batch_of_result and row == left and a.ndim == len(batch) + 2):
        return None
    if (first, second) == (right, inner) and isinstance(b, RecordedStates):
        return torch.matmul(a, b.transpose(-2, -1))
    return torch.matmul(a, b) if (first, second) == (inner, right) else None


@_rule(F.scaled_dot_product_attention)
def _(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if not (_is_given(query) and _is(States, key) and _is(States, value)) or dropout_p or is_causal:
        return None
    if not is_autocast(query) and not query.dtype == key.dtype == value.dtype:
        return None
    call = Call.of(query.shape, key.meaning, value.meaning, grouped=enable_gqa)
    if call is None or call.more is not None:
        return None
    if attn_mask is None:
        mask = _all_columns(call.step, query.device)
    elif _is_given(attn_mask) and axes.broadcasts(attn_mask.shape, call.mask_dims):
        mask = call.mask(attn_mask).expand(-1, -1, -1, call.columns)
        mask = mask if mask.dtype == torch.bool else _finite(mask)
    else:
        return None
    scaling = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return call(query, mask, scaling=scaling).to(value.dtype)
