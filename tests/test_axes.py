"""Axes of rearranged tensors: random sequences of torch's functions, followed on both sides and undone at the end."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_kvquant import axes

ORDER = (("batch",), ("head", axes.REPEAT), ("column",), ("channel",))
SIZES = {"batch": 2, "head": 6, "column": 5, "channel": 4}


def grouped(sizes: tuple[int, ...]) -> list[int]:
    """Some sizes that the same elements can have: neighbours are merged, a one stands in between."""
    merged = [sizes[0]]
    for size in sizes[1:]:
        if random.random() < 0.4:
            merged[-1] *= size
        else:
            merged.append(size)
    if random.random() < 0.3:
        merged.insert(random.randrange(len(merged) + 1), 1)
    return merged


def rearranged(x: torch.Tensor, dims: axes.Dims) -> tuple[torch.Tensor, axes.Dims | None]:
    kind = random.choice(["permute", "reshape", "split", "index", "unsqueeze"])
    if kind == "permute":
        order = random.sample(range(x.ndim), x.ndim)
        return x.permute(order), axes.permute(dims, order)
    if kind == "reshape":
        sizes = grouped(tuple(x.shape))
        return x.reshape(sizes), axes.reshape(dims, sizes)
    if kind == "split":
        # Every axis stands alone again.
        sizes = [size for _, size in axes.flat(dims)]
        return x.reshape(sizes), axes.reshape(dims, sizes)
    if kind == "index":
        return x[:, None], axes.index(dims, (slice(None), None))
    return x.unsqueeze(0), ((), *dims)


@pytest.mark.parametrize("seed", range(40))
def test_arrange_undoes_what_was_done(seed):
    random.seed(seed)
    original = torch.arange(math.prod(SIZES.values())).view(*SIZES.values())
    x, dims = original, axes.named(**SIZES)
    for _ in range(random.randrange(1, 12)):
        x, dims = rearranged(x, dims)
        assert axes.shape(dims) == tuple(x.shape)
    assert torch.equal(axes.arrange(x, dims, ORDER), original)
    assert torch.equal(axes.restore(original, ORDER, dims), x)


@pytest.mark.parametrize("seed", range(20))
def test_what_broadcasts_is_arranged_too(seed):
    """A mask for some of the dimensions gives what the whole mask gives."""
    random.seed(seed)
    dims = axes.named(**SIZES)
    x = torch.zeros(*SIZES.values())
    for _ in range(random.randrange(1, 8)):
        x, dims = rearranged(x, dims)
    sizes = [size if random.random() < 0.5 else 1 for size in x.shape]
    mask = torch.randn(sizes)
    assert axes.broadcasts(mask.shape, dims)
    found = axes.arrange(mask, dims, ORDER)
    assert all(n in (1, size) for n, size in zip(found.shape, SIZES.values()))
    expected = axes.arrange(mask.expand(x.shape), dims, ORDER)
    assert torch.equal(found.expand(expected.shape), expected)


@pytest.mark.parametrize(
    ("repeat", "followed"),
    [
        (lambda x: x.repeat(1, 3, 1, 1), lambda d: axes.repeat(d, (1, 3, 1, 1))),
        (lambda x: x.repeat_interleave(3, 1), lambda d: axes.interleave(d, 3, 1)),
        (lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1),
         lambda d: axes.expand(axes.index(d, (slice(None), slice(None), None)), (-1, -1, 3, -1, -1))),
    ],
    ids=["repeat", "repeat_interleave", "expand"],
)  # fmt: skip
def test_repetitions_follow_their_head(repeat, followed):
    x, dims = torch.randn(*SIZES.values()), followed(axes.named(**SIZES))
    assert torch.equal(axes.arrange(repeat(x), dims, ORDER), x.repeat_interleave(3, 1))


@pytest.mark.parametrize(
    "impossible",
    [
        lambda d: axes.reshape(d, (2, 6, 10, 2)),
        lambda d: axes.reshape(d, (2, 6, 5, 5)),
        lambda d: axes.reshape(d, (2, -1, 7)),
        lambda d: axes.permute(d, (0, 1, 2)),
        lambda d: axes.expand(d, (2, 6, 5, 8)),
        lambda d: axes.repeat(d, (2, 2)),
        lambda d: axes.index(d, (slice(None), 0)),
        lambda d: axes.index(d, (slice(None), slice(1, None))),
        lambda d: axes.index(d, (..., ...)),
        lambda d: axes.index(d, (slice(None),) * 5),
    ],
)
def test_what_axes_cannot_tell(impossible):
    assert impossible(axes.named(**SIZES)) is None


def test_sizes_of_one_are_left_out():
    dims = axes.named(batch=1, head=3, column=1)
    assert dims == ((), (("head", 3),), ())
    assert axes.shape(dims) == (1, 3, 1)
    assert axes.reshape(dims, (3, 1, 1, 1)) == ((("head", 3),), (), (), ())
    assert not axes.broadcasts((2, 3, 1), dims)
