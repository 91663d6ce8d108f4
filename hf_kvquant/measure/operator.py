"""The operator alone: quantized states, the bytes that a call reads, and the checks that come before timing.

The bytes that were written are compared with the reference backend's, attention with the reference backend over the
same bytes, and the reference itself with torch's SDPA over the de-quantized states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from .. import ops
from ..backends import cpu
from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..states import QuantizedStates
from .checks import at_most, is_true, relative_error

# The largest relative error of the output against the float32 reference on the same bytes. BF16 attention, which
# rounds its probabilities and its output to 8 bits, has about 0.003.
TOLERANCE = 0.004
LOGSUMEXP_TOLERANCE = 0.01
REFERENCE_TOLERANCE = 1e-5

Sides = tuple[QuantizedStates, QuantizedStates]


def random_states(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device="cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[batch, heads, length, head_dim]`; keys have biased and outlier channels."""
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device, "dtype": dtype}
    key, value = (torch.randn(batch, heads, length, head_dim, **options) for _ in range(2))
    key += torch.randn(head_dim, **options)
    key[..., :: head_dim // 4] *= 4
    return key, value


def random_query(
    batch: int, heads: int, q_len: int, head_dim: int, dtype: torch.dtype, device="cpu", seed: int = 1
) -> torch.Tensor:
    """`[batch, heads, q_len, head_dim]`"""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, heads, q_len, head_dim, generator=generator, device=device, dtype=dtype)


def fill(config: KVQuantConfig, key: torch.Tensor, value: torch.Tensor, one_by_one: int = 1, room: int = 0) -> Sides:
    """States of a cache that got the last `one_by_one` tokens singly, all others at once, and has room for `room`."""
    _, heads, length, head_dim = key.shape
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim)
    cache = QuantizedCache(model, config, max_length=length + room)
    prompt = length - one_by_one
    cache.update(key[:, :, :prompt], value[:, :, :prompt], 0)
    # Without a model, attention cannot show that it takes the states.
    cache.enable_fused()
    for t in range(prompt, length):
        states: Any = cache.update(key[:, :, t : t + 1], value[:, :, t : t + 1], 0)
    return states


def reference_fill(config: KVQuantConfig, key: torch.Tensor, value: torch.Tensor) -> Sides:
    """The states that the reference backend writes, on the processor."""
    return fill(replace(config, backend="reference"), key.cpu(), value.cpu())


def part(states: QuantizedStates, rows: slice, heads: slice, **fields) -> QuantizedStates:
    """Some rows and KV heads of the states, with other `fields`."""
    positions = None if states.sink_positions is None else states.sink_positions[rows]
    stored = states.stored.transformed(lambda x: x[rows, heads])
    return replace(states, stored=stored, sink_positions=positions, **fields)


def bytes_read(states: QuantizedStates) -> int:
    """Bytes that one query must read: codes and scales of the body and, in place of its end, the exact tokens."""
    batch, heads, length, head_dim = states.shape
    body = min(states.dense_from(length - 1), length)
    scale_rows = -(-body // states.spec.block_length) if states.spec.is_channel else body
    scales = sum(t.shape[-1] * t.element_size() for t in (states.scale, states.zero_point) if t is not None)
    column = states.data.shape[-1] * states.data.element_size()
    sinks = 0 if states.sink is None else states.sink.nbytes
    exact = (length - body) * head_dim * states.dtype.itemsize
    return batch * heads * (body * column + scale_rows * scales + exact) + sinks


def packed(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[batch, heads, 1, head_dim]` as `[batch, kv_heads, heads / kv_heads, head_dim]`."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's attention over a dense cache, with query heads packed by KV head as in transformers' `pack_gqa`."""
    return sdpa_call(query, key, value)().reshape_as(query)


def sdpa_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of what `sdpa` computes, to be timed: nothing but torch's attention. Its output is packed."""
    return partial(scaled_dot_product_attention, packed(query, key.shape[1]), key, value)


def attention_call(query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> Callable:
    """A call of what `attention` computes, to be timed: nothing but the operator."""
    return partial(ops.decode_attention, query, keys, values, scaling=_scaling(query))


def attention(query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates, *args, **kwargs):
    """The operator: output and log-sum-exp."""
    return attention_call(query, keys, values)(*args, **kwargs)


def append(tokens: Sequence[tuple[torch.Tensor, torch.Tensor]], states: Sides, start: int) -> Callable:
    """A call that writes pairs of K and V `[batch, heads, n, head_dim]`, one after the other, from column `start` on,
    and returns the counters of faults."""
    faults = torch.zeros(2, dtype=torch.int64, device=states[0].device)

    def write() -> torch.Tensor:
        end = start
        for key, value in tokens:
            ops.quantize_append(key, value, *states, faults, start=end)
            end += key.shape[2]
        return faults

    return write


def cpu_levels() -> list[str]:
    """The instruction sets that the CPU backend can use here, the simplest first."""
    return cpu.info()["available"]


def attention_on(level: str, query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> torch.Tensor:
    """The output of the CPU backend with the given instruction set."""
    return cpu.decode_attention(query, keys, values, scaling=_scaling(query), isa=level)[0]


def check_bytes(name: str, stored: Sides, expected: Sides) -> list[dict]:
    """Checks that every byte that a query may read equals the reference's."""
    checks = []
    for side, ours, theirs in zip(("keys", "values"), stored, expected):
        spec, length = ours.spec, ours.length
        rows = length // spec.block_length if spec.is_channel else length
        columns = rows * spec.block_length if spec.is_channel else length
        parts = [("data", slice(columns)), ("scale", slice(rows)), ("zero_point", slice(rows))]
        if ours.recent is not None:
            ring = ours.recent.shape[2]
            parts.append(("recent", torch.arange(max(0, length - ring), length) % ring))
        parts.append(("sink", slice(min(length, ours.sink.shape[2] if ours.sink is not None else 0))))
        for part, index in parts:
            a, b = getattr(ours, part), getattr(theirs, part)
            if a is not None:
                equal = torch.equal(a[:, :, index], b[:, :, index])
                checks.append(is_true(name, f"appended {side}: {part} has the reference's bytes", equal))
    return checks


def reference_attention(query: torch.Tensor, *states: QuantizedStates) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference backend in float32 over the stored bytes, one KV head at a time, because it makes large copies."""
    kv_heads = states[0].shape[1]
    q_per_kv = query.shape[1] // kv_heads
    float32 = {"dtype": torch.float32, "backend": "reference"}
    parts = [
        attention(
            query[:, i * q_per_kv : (i + 1) * q_per_kv].float(),
            *(part(side, slice(None), slice(i, i + 1), **float32) for side in states),
        )
        for i in range(kv_heads)
    ]
    return torch.cat([output for output, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def check_output(name: str, found: tuple[torch.Tensor, torch.Tensor], expected: tuple) -> list[dict]:
    """Checks that an output and its log-sum-exp are near the reference's."""
    difference = (found[1] - expected[1]).abs().max().nan_to_num(torch.inf).item()
    return [
        at_most(name, "attention against the reference", relative_error(found[0], expected[0]), TOLERANCE),
        at_most(name, "log-sum-exp against the reference", difference, LOGSUMEXP_TOLERANCE),
    ]


def check_attention(name: str, query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> list[dict]:
    """Checks that the operator agrees with the reference, and the reference with SDPA over the de-quantized states."""
    expected, expected_lse = reference_attention(query, keys, values)
    k, v = dequantized(keys), dequantized(values)
    scores = packed(query.float(), k.shape[1]) @ k.mT * _scaling(query)
    error = relative_error(expected, sdpa(query.float(), k, v))
    lse_error = relative_error(expected_lse, scores.logsumexp(-1).reshape_as(expected_lse))
    return [
        *check_output(name, attention(query, keys, values), (expected, expected_lse)),
        at_most(name, "reference against SDPA", error, REFERENCE_TOLERANCE),
        at_most(name, "reference against log-sum-exp", lse_error, REFERENCE_TOLERANCE),
    ]


def dequantized(states: QuantizedStates) -> torch.Tensor:
    """The states that the next query reads, in float32."""
    return replace(states, dtype=torch.float32).dequantize()


def _scaling(query: torch.Tensor) -> float:
    return query.shape[-1] ** -0.5
