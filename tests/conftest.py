"""Fixtures for several test files: the seed, keys as trained models have them, states stored in poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from hf_kvquant import QuantizedStates, QuantSpec, ops, route


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Warnings that are given once per process are given once per test."""
    monkeypatch.setattr(route, "_said", set())


@pytest.fixture
def outlier() -> Callable[..., torch.Tensor]:
    return _outlier


@pytest.fixture
def store() -> Callable[..., tuple[QuantizedStates, QuantizedStates]]:
    return _store


def _outlier(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys or values `[batch, num_kv_heads, kv_len, head_dim]` as trained models make them: one channel in eight is
    ten times larger, one in eight sits far from zero, and some tokens are large."""
    batch, num_kv_heads, kv_len, head_dim = shape
    size = torch.where(torch.rand(num_kv_heads, 1, head_dim) < 1 / 8, 10.0, 1.0)
    offset = torch.where(torch.rand(num_kv_heads, 1, head_dim) < 1 / 8, 20.0, 0.0) * torch.randn(num_kv_heads, 1, 1)
    token = 1 + 3 * (torch.rand(batch, 1, kv_len, 1) < 1 / 16)
    return (torch.randn(shape) * size * token + offset).to(dtype)


def _poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Storage full of NaN, as an fp8 code too, so that reading it shows in the result."""
    return torch.full(shape, 0xFF if dtype == torch.uint8 else torch.nan, dtype=dtype)


def _store(
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
    batch, num_kv_heads, kv_len, _ = key.shape
    capacity = capacity or kv_len + 70
    sink_positions = torch.full((batch, sink_length), -1, dtype=torch.int32)

    def empty_states(spec: QuantSpec, x: torch.Tensor) -> QuantizedStates:
        head_dim = x.shape[-1]
        spec = spec.resolve(head_dim)
        heads = (batch, num_kv_heads)
        scale = zero_point = recent = sink = None
        if spec.is_dense:
            data = _poisoned(*heads, capacity, head_dim, dtype=x.dtype)
        else:
            data = _poisoned(*heads, capacity, spec.row_bytes(head_dim), dtype=torch.uint8)
            rows = -(-capacity // spec.block_length) if spec.is_channel else capacity
            scale = _poisoned(*heads, rows, spec.num_scales(head_dim), dtype=torch.float16)
            zero_point = scale.clone() if spec.has_zero_point else None
            window = max(recent_length, spec.block_length or 0)
            if window:
                recent = _poisoned(*heads, min(window + 64, capacity), head_dim, dtype=x.dtype)
            if sink_length:
                sink = _poisoned(*heads, sink_length, head_dim, dtype=x.dtype)
        return QuantizedStates(
            spec,
            data,
            scale,
            zero_point,
            recent,
            sink,
            sink_positions,
            kv_len,
            recent_length,
            head_dim,
            x.dtype,
            backend,
        )

    keys, values = empty_states(k_spec, key), empty_states(v_spec, value)
    faults = torch.zeros(2, dtype=torch.int64) if faults is None else faults
    start = 0
    for n in chunks or [kv_len]:
        new = slice(start, start + n)
        append(key[:, :, new], value[:, :, new], keys, values, faults, padding, start=start)
        start += n
    assert start == kv_len, (start, kv_len)
    return keys, values
