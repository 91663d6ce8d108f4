"""States for tests, in memory that was poisoned before, so that reading unwritten storage shows in the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from extremes import put_extremes

from hf_kvquant import QuantizedStates, QuantSpec, ops, reference
from hf_kvquant.storage import Side

KEY_SPECS = {
    "int8": QuantSpec("int8"),
    "int8-group16": QuantSpec("int8", group_size=16),
    "int8-rotated": QuantSpec("int8", group_size=32, rotate=True),
    "int8-channel": QuantSpec("int8", "channel"),
    "int8-channel16": QuantSpec("int8", "channel", block_length=16),
    "fp8": QuantSpec("fp8"),
    "fp8-group16": QuantSpec("fp8", group_size=16),
    "fp8-rotated": QuantSpec("fp8", rotate=True),
    "fp8-channel": QuantSpec("fp8", "channel"),
    "fp8-channel32": QuantSpec("fp8", "channel", block_length=32),
    "int4": QuantSpec("int4", group_size=32),
    "int4-group16": QuantSpec("int4", group_size=16),
    "int4-rotated": QuantSpec("int4", rotate=True),
    "int4-channel": QuantSpec("int4", "channel"),
    "int4-channel256": QuantSpec("int4", "channel", block_length=256),
    "int3-group64": QuantSpec("int3", group_size=64),
    "int3-rotated": QuantSpec("int3", rotate=True),
    "int3-channel": QuantSpec("int3", "channel"),
    "int3-channel16": QuantSpec("int3", "channel", block_length=16),
    "int2": QuantSpec("int2", group_size=32),
    "int2-group16": QuantSpec("int2", group_size=16),
    "int2-group64": QuantSpec("int2", group_size=64),
    "int2-rotated": QuantSpec("int2", rotate=True),
    "int2-channel": QuantSpec("int2", "channel"),
    "dense": QuantSpec("dense"),
}
VALUE_SPECS = dict(KEY_SPECS)


def no_faults() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int64)


def left_padding(kv_len: int, *lengths: int) -> torch.Tensor:
    """Bool `[batch, kv_len]` whose rows begin with `lengths` columns of padding."""
    return torch.arange(kv_len) < torch.tensor(lengths)[:, None]


def poisoned(
    x: torch.Tensor, spec: QuantSpec, capacity: int, sink_positions: torch.Tensor, recent_length: int = 0,
    backend: str = "auto",
) -> QuantizedStates:  # fmt: skip
    """States for the columns of `x` `[batch, num_kv_heads, kv_len, head_dim]`, whose storage holds nothing but NaN
    (0xff in bytes, which is NaN in fp8 too)."""
    side = Side(spec.resolve(x.shape[3]), x, capacity, sink_positions.shape[1], recent_length)
    side.stored.transformed(lambda tensor: tensor.view(torch.uint8).fill_(0xFF))
    return QuantizedStates(
        side.spec, side.stored, sink_positions, x.shape[2], recent_length, side.head_dim, x.dtype, backend
    )


def no_sinks(batch: int, sink_length: int) -> torch.Tensor:
    return torch.full((batch, sink_length), -1, dtype=torch.int32)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_spec: QuantSpec,
    v_spec: QuantSpec,
    *,
    sink_length: int = 0,
    recent_length: int = 0,
    padding: torch.Tensor | None = None,
    chunks: Sequence[int] | None = None,
    capacity: int | None = None,
    append: Callable = ops.quantize_append,
    faults: torch.Tensor | None = None,
    backend: str = "reference",
) -> tuple[QuantizedStates, QuantizedStates]:
    """States of keys and values `[batch, num_kv_heads, kv_len, head_dim]`, in storage that was poisoned before.

    `chunks`: the lengths of the appends (default: one); `capacity`: columns of storage (default: 70 more than needed);
    `padding`: bool `[batch, kv_len]`.
    """
    batch, _, kv_len, _ = key.shape
    rest = (capacity or kv_len + 70, no_sinks(batch, sink_length), recent_length, backend)
    keys, values = poisoned(key, k_spec, *rest), poisoned(value, v_spec, *rest)
    faults = no_faults() if faults is None else faults
    start = 0
    for n in chunks or [kv_len]:
        new = slice(start, start + n)
        append(key[:, :, new], value[:, :, new], keys, values, faults, padding, start=start)
        start += n
    assert start == kv_len, (start, kv_len)
    return keys, values


def make_states(x, spec, *, recent_length=0, sink_length=0, padding=None, slack=5) -> QuantizedStates:
    """States that hold the columns of `x` `[batch, num_kv_heads, kv_len, head_dim]`, written by the reference."""
    block = spec.resolve(x.shape[3]).block_length or 1
    capacity = -(-(x.shape[2] + slack) // block) * block
    states = poisoned(x, spec, capacity, no_sinks(x.shape[0], sink_length), recent_length)
    if x.shape[2]:
        reference.quantize_append(x, x, states, states, no_faults(), padding, start=0)
    return states


def replaced(states: QuantizedStates, **tensors: torch.Tensor | None) -> QuantizedStates:
    """The states with some tensors replaced, by name."""
    return dataclasses.replace(states, stored=states.stored._replace(**tensors))


def random_states(generator, batch, heads, kv_len, head_dim, dtype):
    """States with outlier channels, outlier tokens and a constant offset per channel, like keys of real models."""
    x = torch.randn(batch, heads, kv_len, head_dim, generator=generator)
    x = x * (1 + 6 * (torch.rand(1, heads, 1, head_dim, generator=generator) > 0.95))
    x = x * (1 + 4 * (torch.rand(batch, heads, kv_len, 1, generator=generator) > 0.98))
    return (x + torch.randn(1, heads, 1, head_dim, generator=generator)).to(dtype)


def extreme(dtype, head_dim=64, kv_len=150):
    generator = torch.Generator().manual_seed(5)
    x = random_states(generator, 2, 2, kv_len, head_dim, torch.float32)
    return put_extremes(x, dtype)


def problem(
    k="int8", v="int8", *, seed=0, batch=1, num_kv_heads=2, q_per_kv=2, q_len=1, kv_len=130, head_dim=64,
    v_head_dim=None, dtype=torch.float32, recent_length=0, sink_length=0, padding=None,
):  # fmt: skip
    """A query, and states of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_kv_heads, kv_len)
    key = random_states(generator, *shape, head_dim, dtype)
    value = random_states(generator, *shape, v_head_dim or head_dim, dtype)
    window = dict(recent_length=recent_length, sink_length=sink_length, padding=padding)
    keys, values = make_states(key, KEY_SPECS[k], **window), make_states(value, VALUE_SPECS[v], **window)
    # The layout that a projection gives: [batch, q_len, heads, head_dim] in memory.
    query = torch.randn(batch, q_len, num_kv_heads * q_per_kv, head_dim, generator=generator).to(dtype)
    return query.transpose(1, 2), keys, values


def same_bytes(a: QuantizedStates, b: QuantizedStates) -> None:
    for name in ("data", "scale", "zero_point", "recent"):
        x, y = getattr(a, name), getattr(b, name)
        if x is not None:
            x, y = x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
            different = (x != y).nonzero()
            assert not len(different), (name, len(different), different[0].tolist(), x[x != y][:4], y[x != y][:4])
