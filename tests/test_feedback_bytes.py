"""Error feedback in the encoder: the definition by a second implementation in NumPy, which tells a fused product and
another order of channels apart, and the same bytes from every kernel."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from levels import LEVELS
from stored import extreme, left_padding, random_states, same_bytes, store
from test_pages import filled

from hf_kvquant import KVQuantConfig, QuantSpec, quantize, reference
from hf_kvquant.backends import cpu

SPECS = {
    "int4": QuantSpec("int4", "channel"),
    "int4-16": QuantSpec("int4", "channel", block_length=16),
    "int4-256": QuantSpec("int4", "channel", block_length=256),
    "int8-32": QuantSpec("int8", "channel", block_length=32),
    "fp8": QuantSpec("fp8", "channel"),
    "int3": QuantSpec("int3", "channel", block_length=128),
    "int2": QuantSpec("int2", "channel"),
}
by_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def some_factors(head_dim: int, num_kv_heads: int = 2, seed: int = 0) -> torch.Tensor:
    factors = torch.randn(num_kv_heads, head_dim, head_dim, generator=torch.Generator().manual_seed(seed))
    return (factors * 0.3).tril(-1)


def by_numpy(
    block: np.ndarray, counted: np.ndarray, factors: np.ndarray, spec: QuantSpec, fused: bool = False, order: int = 1
) -> np.ndarray:
    """The decoded elements of a block `[length, head_dim]`, integers only.

    fused: product and difference with one rounding, which is wrong; order: -1 takes the first channel first, as wrong.
    """
    levels, part = {"int8": (255, 0), "int4": (15, 0), "int3": (7, 0.035), "int2": (3, 0.075)}[spec.format]
    f32, x, found = np.float32, block.astype(np.float32)[:, ::order].copy(), np.zeros_like(block, dtype=np.float32)
    for c in reversed(range(x.shape[1])):
        seen = x[counted & np.isfinite(x[:, c]), c]
        low, high = (seen.min(), seen.max()) if len(seen) else (f32(0), f32(0))
        if part:
            margin = high * f32(part) - low * f32(part)
            low, high = low + margin, high - margin
        zero = f32(np.float16(np.clip(low, -65504, 65504)))
        scale = f32(np.float16(np.clip((high - zero) * f32(1 / levels), -65504, 65504)))
        code = np.zeros(len(x), f32)
        if scale:
            code = np.clip(np.rint((x[:, c] - zero) * (f32(1) / scale)), 0, levels)
            code = np.where(np.isnan(x[:, c]), f32(0), code)
        found[:, c] = zero + code * scale
        error = x[:, c] - found[:, c]
        error = np.where(np.isfinite(error), error, f32(0))
        for j in range(c):
            if fused:
                x[:, j] = (x[:, j].astype(np.float64) - factors[c, j].astype(np.float64) * error).astype(np.float32)
            else:
                x[:, j] = x[:, j] - factors[c, j] * error
    return found[:, ::order]


def a_block(length: int) -> torch.Tensor:
    return random_states(torch.Generator().manual_seed(3), 2, 2, length, 32, torch.float32)


def strong_factors(seed: int = 0) -> torch.Tensor:
    """Factors with which a channel consists of the errors of those before it, so that codes of all show a rounding."""
    return 1000 * some_factors(32, seed=seed)


class TestDefinition:
    @pytest.mark.parametrize("name", ["int4", "int8-32", "int3", "int2"])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_equals_a_second_implementation(self, name):
        spec = SPECS[name]
        x, factors = a_block(spec.block_length), some_factors(32)
        x[0, 0, 5, 7], x[1, 0, 6, 2], x[:, 1, :, 9] = torch.nan, torch.inf, 1.5
        padding = left_padding(spec.block_length, 0, 9)
        found = quantize(x, spec, padding, factors).dequantize()
        for b, h in np.ndindex(2, 2):
            expected = by_numpy(x[b, h].numpy(), ~padding[b].numpy(), factors[h].numpy(), spec)
            assert np.array_equal(found[b, h].numpy(), expected)

    @pytest.mark.parametrize("wrong", [{"fused": True}, {"order": -1}], ids=["fused", "order"])
    def test_steps_that_differ_show(self, wrong):
        x, factors, spec = a_block(32), strong_factors(), SPECS["int8-32"]
        found = quantize(x, spec, None, factors).dequantize()[0, 0].numpy()
        by_steps = functools.partial(by_numpy, x[0, 0].numpy(), np.ones(32, bool), factors[0].numpy(), spec)
        assert np.array_equal(found, by_steps())
        assert not np.array_equal(found, by_steps(**wrong))

    @by_spec
    def test_factors_of_zero_change_nothing(self, spec):
        x = extreme(torch.float32, 32)
        plain, fed = quantize(x, spec), quantize(x, spec, None, torch.zeros(2, 32, 32))
        for a, b in zip((plain.data, plain.scale), (fed.data, fed.scale)):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    def test_tokens_do_not_meet(self):
        """A token's codes change with another token through scales alone, and padding changes none."""
        x, factors = a_block(64), some_factors(32)
        padding = left_padding(64, 3, 3)
        other = x.clone()
        other[:, :, :3] = 100.0
        a, b = (quantize(y, SPECS["int4"], padding, factors) for y in (x, other))
        assert torch.equal(a.data[:, :, 3:], b.data[:, :, 3:]) and torch.equal(a.scale, b.scale)

    @pytest.mark.parametrize(
        ("spec", "factors", "message"),
        [
            (
                SPECS["int4"],
                torch.zeros(2, 32, 16),
                r"factors: \(2, 32, 16\) of torch.float32 .* expected \(2, 32, 32\)",
            ),
            (SPECS["int4"], torch.zeros(2, 32, 32).double(), "of torch.float64 is not allowed"),
            (QuantSpec("int4"), torch.zeros(2, 32, 32), "for int4:token:32; expected .* on the channel grid"),
        ],
        ids=["shape", "dtype", "token-grid"],
    )
    def test_factors_that_do_not_fit(self, spec, factors, message):
        with pytest.raises(ValueError, match=message):
            quantize(a_block(64), spec, None, factors)
        for append in (reference.quantize_append, cpu.quantize_append):
            with pytest.raises(ValueError, match=f"key .*{message}"):
                store(a_block(64), a_block(64), spec, spec, append=functools.partial(append, factors=(factors, None)))


class TestKernels:
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @by_spec
    def test_bytes_equal_the_reference(self, spec, dtype, level):
        """Keys and values of different head_dims and factors, with extremes, padding and blocks that several appends
        complete."""
        key, value = extreme(dtype, 64, 300), extreme(dtype, 80, 300).flip(2)
        factors = some_factors(64), some_factors(80, seed=1)
        window = dict(padding=left_padding(300, 0, 30), recent_length=8, sink_length=2)
        for chunks in ([300], [1, 62, 2, 100, 135]):
            got, expected = (
                store(
                    key, value, spec, spec, chunks=chunks, append=functools.partial(append, factors=factors), **window
                )
                for append in (functools.partial(cpu.quantize_append, isa=level), reference.quantize_append)
            )
            for a, b in zip(got, expected):
                same_bytes(a, b)

    @pytest.mark.parametrize("level", LEVELS)
    def test_every_product_is_rounded(self, level):
        x, factors = a_block(96), (strong_factors(), strong_factors(1))
        got, expected = (
            store(x, x, SPECS["int8-32"], SPECS["int8-32"], append=functools.partial(append, factors=factors))
            for append in (functools.partial(cpu.quantize_append, isa=level), reference.quantize_append)
        )
        for a, b in zip(got, expected):
            same_bytes(a, b)

    @pytest.mark.parametrize("level", LEVELS)
    def test_one_side_alone(self, level):
        x, factors = a_block(130), some_factors(32)
        specs = SPECS["int4"], QuantSpec("int4", rotate=True)
        got, expected, plain = (
            store(x, x, *specs, append=append)
            for append in (
                functools.partial(cpu.quantize_append, isa=level, factors=(factors, None)),
                functools.partial(reference.quantize_append, factors=(factors, None)),
                reference.quantize_append,
            )
        )
        for a, b in zip(got, expected):
            same_bytes(a, b)
        same_bytes(got[1], plain[1])
        assert not torch.equal(got[0].data[:, :, :128], plain[0].data[:, :, :128])

    def test_two_threads(self):
        x = random_states(torch.Generator().manual_seed(7), 1, 2, 3000, 128, torch.bfloat16)
        factors = some_factors(128), some_factors(128, seed=1)
        got, expected = (
            store(x, x, SPECS["int4"], SPECS["int3"], append=functools.partial(append, factors=factors))
            for append in (cpu.quantize_append, reference.quantize_append)
        )
        for a, b in zip(got, expected):
            same_bytes(a, b)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_pages(self, backend):
        """Pages have the bytes of contiguous storage."""
        config = KVQuantConfig(SPECS["int4"], SPECS["int8-32"], sink_length=4, recent_length=32)
        factors = some_factors(32), some_factors(32, seed=1)
        pool, rows = filled(config, torch.bfloat16, backend, factors=factors)
        plain, _ = filled(config, torch.bfloat16, backend)
        table = pool.table([300], [4])
        for paged, without, whole in zip(pool.layer.states(table), plain.layer.states(table), rows[4](300)):
            assert torch.equal(paged.past(0), whole.read(0))
            assert not torch.equal(paged.past(0), without.past(0))
