"""Axes of a tensor that a model rearranges: what is in each of its dimensions, and how to put them in order again.

    dims = named(batch=2, head=4, column=10, channel=16)     # [2, 4, 10, 16]
    dims = reshape(dims, (8, 10, 16))                        # [batch * head, column, channel]
    dims = permute(dims, (0, 2, 1))                          # [batch * head, channel, column]

`Dims` holds for each dimension the named axes that are merged in it, the slowest first. Axes of size 1 are left out:
they can stand anywhere. Each function returns None where a result cannot be told by axes, an axis cut in two for
instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

Axis = tuple[str, int]
Dims = tuple[tuple[Axis, ...], ...]

# A copy of the same states for another query head.
REPEAT = "repeat"


def named(**sizes: int) -> Dims:
    """One axis per dimension."""
    return tuple(((name, size),) if size > 1 else () for name, size in sizes.items())


def shape(dims: Dims) -> tuple[int, ...]:
    return tuple([prod([size for _, size in dim]) for dim in dims])


def flat(dims: Dims) -> list[Axis]:
    return [axis for dim in dims for axis in dim]


def reshape(dims: Dims, sizes: Sequence[int]) -> Dims | None:
    """As `Tensor.reshape`; one size may be -1."""
    total = prod(shape(dims))
    if -1 in sizes:
        known = -prod(sizes)
        if known <= 0 or total % known:
            return None
        sizes = [total // known if size == -1 else size for size in sizes]
    if prod(sizes) != total:
        return None
    axes, at, merged = flat(dims), 0, []
    for size in sizes:
        start, found = at, 1
        while found < size:
            found *= axes[at][1]
            at += 1
        if found != size:
            return None
        merged.append(tuple(axes[start:at]))
    return tuple(merged)


def permute(dims: Dims, order: Sequence[int]) -> Dims | None:
    return tuple([dims[i] for i in order]) if len(order) == len(dims) else None


def transpose(dims: Dims, a: int, b: int) -> Dims:
    swapped = list(dims)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def expand(dims: Dims, sizes: Sequence[int]) -> Dims | None:
    """As `Tensor.expand`: a dimension of size 1 becomes repetitions."""
    dims = ((),) * (len(sizes) - len(dims)) + dims
    if len(sizes) != len(dims):
        return None
    expanded = []
    for dim, old, new in zip(dims, shape(dims), sizes):
        if new not in (-1, old) and old != 1:
            return None
        expanded.append(dim if new in (-1, old) else ((REPEAT, new),))
    return tuple(expanded)


def repeat(dims: Dims, counts: Sequence[int]) -> Dims | None:
    """As `Tensor.repeat`: the repetitions of a dimension are slower than what they repeat."""
    dims = ((),) * (len(counts) - len(dims)) + dims
    if len(counts) != len(dims) or min(counts) < 1:
        return None
    return tuple(dim if count == 1 else ((REPEAT, count), *dim) for dim, count in zip(dims, counts))


def interleave(dims: Dims, count: int, at: int) -> Dims:
    """As `repeat_interleave`: the repetitions are faster."""
    return tuple((*dim, (REPEAT, count)) if i == at and count > 1 else dim for i, dim in enumerate(dims))


def index(dims: Dims, keys: object) -> Dims | None:
    """As indexing with None, `:` and `...`."""
    keys = keys if isinstance(keys, tuple) else (keys,)
    if any(key is not None and key is not ... and key != slice(None) for key in keys) or keys.count(...) > 1:
        return None
    rest = len(dims) - sum(key is not None and key is not ... for key in keys)
    if rest < 0:
        return None
    if ... not in keys:
        keys = (*keys, ...)
    old = iter(dims)
    new: list[tuple[Axis, ...]] = []
    for key in keys:
        new += [()] if key is None else [next(old) for _ in range(rest if key is ... else 1)]
    return tuple(new)


def broadcasts(sizes: Sequence[int], dims: Dims) -> bool:
    """Whether a tensor of these sizes can be added to one of these dimensions without changing its shape."""
    own = shape(dims)
    return len(sizes) <= len(own) and all(n in (1, m) for n, m in zip(reversed(sizes), reversed(own)))


def _positions(axes: list[Axis], order: Sequence[Sequence[str]]) -> list[int]:
    return [i for group in order for wanted in group for i, (name, _) in enumerate(axes) if name == wanted]


def arrange(x: torch.Tensor, dims: Dims, order: Sequence[Sequence[str]]) -> torch.Tensor:
    """`x`, which broadcasts against `dims`, with one dimension per group of names in `order`, of size 1 where it
    broadcasts against the whole group."""
    axes: list[Axis] = []
    sizes: list[int] = []
    for n, dim in zip((1,) * (len(dims) - x.ndim) + tuple(x.shape), dims):
        axes += dim
        sizes += [size if n > 1 else 1 for _, size in dim]
    positions = _positions(axes, order)
    if positions != list(range(len(positions))):
        x = x.reshape(sizes).permute(positions)
        sizes = [sizes[i] for i in positions]
    full: list[int] = []
    groups, at = [], 0
    for group in order:
        members = [axes[i][1] for i in positions if axes[i][0] in group]
        now = sizes[at : at + len(members)]
        at += len(members)
        full += members if max(now, default=1) > 1 else now
        groups.append(prod(full[len(full) - len(members) :]) if members else 1)
    if full != sizes:
        x = x.reshape(sizes).expand(full)
    return x.reshape(groups)


def restore(x: torch.Tensor, order: Sequence[Sequence[str]], dims: Dims) -> torch.Tensor:
    """The inverse of `arrange`, for a tensor that does not broadcast."""
    axes = flat(dims)
    positions = _positions(axes, order)
    if positions != list(range(len(positions))):
        inverse = sorted(range(len(positions)), key=positions.__getitem__)
        x = x.reshape([axes[i][1] for i in positions]).permute(inverse)
    return x.reshape(shape(dims))
