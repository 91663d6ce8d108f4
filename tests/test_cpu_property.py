"""The CPU backend equals the reference for any shape, format, window and mask, and for extreme elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, TOLERANCE
from stored import KEY_SPECS, VALUE_SPECS, make_states, random_states

from hf_kvquant import reference
from hf_kvquant.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def fits(spec, head_dim: int) -> bool:
    return spec.is_dense or spec.is_channel or head_dim % (spec.group_size or head_dim) == 0


def spoil(x: torch.Tensor, how: str, token: int) -> None:
    """Write elements that real models rarely have. Scores of a key of 1e4 would depend on its last bit; it is 50."""
    if how == "zeros":
        x.zero_()
    elif how == "tiny":
        x.mul_(1e-7)
    elif how == "large":
        x[:, :, token, 3] = 50
    elif how in ("nan", "inf"):
        x[:, :, token, 5] = float(how)


@st.composite
def problems(draw):
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320]), "head_dim")
    specs = [
        draw(st.sampled_from([name for name, spec in table.items() if fits(spec, head_dim)]), side)
        for side, table in (("keys", KEY_SPECS), ("values", VALUE_SPECS))
    ]
    kv_len = draw(st.integers(1, 300), "kv_len")
    q_len = draw(st.integers(1, min(16, kv_len)), "q_len")
    batch, num_kv_heads, q_per_kv = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 8)), "heads")
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    window = dict(
        recent_length=draw(st.sampled_from([0, 1, 40]), "recent"), sink_length=draw(st.integers(0, 3), "sinks")
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000), "seed"))
    states = []
    for table, name in ((KEY_SPECS, specs[0]), (VALUE_SPECS, specs[1])):
        x = random_states(generator, batch, num_kv_heads, kv_len, head_dim, dtype)
        # An infinite key that is read exactly has an infinite score, for which no result is defined.
        extremes = ["", "", "zeros", "tiny", "large", "nan"] + (["inf"] if table is VALUE_SPECS else [])
        spoil(x, draw(st.sampled_from(extremes)), kv_len // 2)
        states.append(make_states(x, table[name], **window))
    query = torch.randn(batch, num_kv_heads * q_per_kv, q_len, head_dim, generator=generator).to(dtype)
    mask = None
    if draw(st.booleans(), "masked"):
        mask = torch.rand(batch, 1, q_len, kv_len, generator=generator) > 0.5
    softcap = draw(st.sampled_from([0.0, 0.0, 20.0]), "softcap")
    return query, *states, mask, softcap


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_equals_the_reference(problem):
    query, keys, values, mask, softcap = problem
    scaling = query.shape[-1] ** -0.5
    expected, expected_lse = reference.decode_attention(query, keys, values, mask, scaling=scaling, softcap=softcap)
    tolerance, lse_tolerance = TOLERANCE[query.dtype]
    # Where an element is not finite, only the pattern of NaN is defined; elsewhere the usual bounds hold.
    good = expected.isfinite()
    largest = max(expected[good].float().abs().max().item() if good.any() else 0.0, 1e-6)
    for level in LEVELS:
        output, lse = cpu.decode_attention(query, keys, values, mask, scaling=scaling, softcap=softcap, isa=level)
        assert torch.equal(output.isfinite(), good), level
        error = (output[good].float() - expected[good].float()).abs()
        # FP16 has no numbers between multiples of its smallest.
        allowed = tolerance * largest + torch.finfo(query.dtype).smallest_normal * torch.finfo(query.dtype).eps
        assert not error.numel() or error.max().item() <= allowed, (level, error.max().item(), largest)
        torch.testing.assert_close(
            lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance, equal_nan=True, msg=level
        )
