"""Models in float32 on a GPU: kernels/cuda/float32.h, in the emulator and in the PTX machine, against float64.

The error is that of the reference in float32, about 1e-6 of the largest output; the limit is 2^-16 of it.
"""

from __future__ import annotations

import dataclasses
import functools

import emulator
import ptx_machine
import ptxas
import pytest
import test_cuda_pages
import test_pages
import torch
from ptx_memory import Fault
from stored import KEY_SPECS, VALUE_SPECS, left_padding, make_states, problem
from test_cuda_append import extreme, same_bytes
from test_cuda_attention import TOLERANCE, attend, poisoned
from test_cuda_ptx import planted  # noqa: F401  # a fixture
from test_cuda_ptx import problem as stored_problem

from hf_kvquant import KVQuantConfig, QuantSpec, reference
from hf_kvquant.backends import cuda
from hf_kvquant.measure.families import PRESETS

FLOAT = torch.float32
LIMIT, LOGSUMEXP_LIMIT = TOLERANCE[FLOAT]

# Every format and grid, narrow and wide heads, float32 rows that are no copies; not every pair of them.
CASES = [
    ("int8-channel", "int8", 64, 64),
    ("int8", "int4", 64, 64),
    ("int4-channel", "int4-rotated", 128, 128),
    ("fp8", "fp8", 128, 64),
    ("dense", "int8-rotated", 64, 128),
    ("int4-rotated", "dense", 80, 80),
    ("int8-channel16", "fp8-rotated", 80, 112),
    ("int4-channel256", "int4", 112, 192),
    ("int8-channel", "int8", 256, 256),
    ("dense", "dense", 128, 128),
    ("int8-channel", "int4-channel", 128, 128),
    ("int8-channel", "int8-channel", 512, 512),
    ("int4-rotated", "int4-rotated", 512, 512),
    ("dense", "fp8", 512, 64),
    ("int3-rotated", "int2-group64", 64, 256),
    ("int2-channel", "int3-group64", 128, 256),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[1]}-{c[3]}")
FEW = [CASES[1], CASES[2], CASES[5], CASES[10]]
few_cases = pytest.mark.parametrize("case", FEW, ids=["token", "channel", "dense", "channel values"])

needs_nvrtc = pytest.mark.skipif(ptxas.missing() is not None, reason=f"{ptxas.missing()}")


def of(case, **sizes):
    k, v, head_dim, v_head_dim = case
    return problem(k, v, head_dim=head_dim, v_head_dim=v_head_dim, dtype=FLOAT, **{"num_kv_heads": 1, **sizes})


def check(query, keys, values, mask=None, s_aux=None, *, scaling=None, softcap=0.0, **how):
    """The kernels' result, compared with the reference in float64 over the same bytes."""
    settings = dict(scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap)
    exact = (dataclasses.replace(states, dtype=torch.float64) for states in (keys, values))
    expected, expected_lse = reference.decode_attention(query.double(), *exact, mask, s_aux, **settings)
    output, lse = attend(query, keys, values, mask, s_aux, **settings, **how)
    assert output.dtype == lse.dtype == FLOAT
    assert torch.equal(output.isnan(), expected.isnan())
    error = (output - expected).nan_to_num().abs().max() / expected.nan_to_num().abs().max().clamp(min=1e-30)
    assert error <= LIMIT, error
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=0, atol=LOGSUMEXP_LIMIT, equal_nan=True)
    return output


class TestInTheEmulator:
    @every_case
    def test_formats(self, case):
        check(*of(case, kv_len=330, q_per_kv=4))
        check(*of(case, kv_len=150, q_per_kv=3, q_len=3, recent_length=20, sink_length=3))

    def test_fp8_with_the_conversions_of_sm_89(self):
        check(*of(CASES[3], kv_len=330), device=emulator.Device(arch=890))

    @few_cases
    def test_masks_softcap_and_learned_sinks(self, case):
        padding = left_padding(170, 70, 3)
        check(*of(case, batch=2, kv_len=170, q_len=2, recent_length=16, sink_length=2, padding=padding), ~padding)
        hidden = torch.rand(1, 2, 3, 140, generator=torch.Generator().manual_seed(1)) < 0.4
        bias = torch.randn(1, 2, 3, 140).masked_fill(hidden, torch.finfo(FLOAT).min)
        check(*of(case, kv_len=140, q_len=3), bias, torch.linspace(-3, 6, 2))
        check(*of(case, kv_len=140, q_per_kv=12), softcap=5.0)

    @few_cases
    def test_hidden_columns_may_hold_anything(self, case):
        query, keys, values = of(case, kv_len=150, q_len=2, recent_length=30)
        hidden = torch.zeros(150, dtype=torch.bool)
        hidden[[0, 5, 60, 100, 125, 149]] = True
        mask = ~hidden[None, None, None].repeat(1, 1, 2, 1)
        mask[:, :, 1] = True  # row 1 sees columns that row 0 does not
        bad = poisoned(keys, hidden), poisoned(values, hidden)
        output, _ = attend(query, *bad, mask, scaling=0.1)
        clean, _ = attend(query, keys, values, mask, scaling=0.1)
        assert torch.equal(output[:, :, 0], clean[:, :, 0])
        assert output[:, :, 1].isnan().any()

    @pytest.mark.parametrize("q_per_kv", [1, 4], ids=["8 rows", "more rows"])
    def test_numbers_that_are_not_finite_reach_those_who_see_them(self, q_per_kv):
        query, keys, values = of(CASES[5], kv_len=40, q_len=3, q_per_kv=q_per_kv)
        values.data[:, :, 20, 6] = torch.nan
        values.data[:, :, 38, 5] = torch.inf
        values.data[:, :, 39, 7] = -torch.inf
        check(query, keys, values)

    @few_cases
    def test_many_light_columns_beside_a_heavy_one(self, case):
        """Weights of 1e-6, of values 1000 times larger than the heavy column's, count as much as it does."""
        k, v, head_dim, v_head_dim = case
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(1, 1, 512, head_dim, generator=generator) * 0.01
        value = torch.rand(1, 1, 512, v_head_dim, generator=generator) * 50 + 50
        key[:, :, 3], value[:, :, 3] = 14.0 / head_dim, 0.05
        states = make_states(key, KEY_SPECS[k]), make_states(value, VALUE_SPECS[v])
        check(torch.ones(1, 4, 1, head_dim), *states, scaling=1.0, split=512)

    @pytest.mark.parametrize("size", [1e-4, 1.0, 3000.0])
    @few_cases
    def test_large_and_small_numbers(self, case, size):
        k, v, head_dim, v_head_dim = case
        generator = torch.Generator().manual_seed(0)
        key, value = (torch.randn(1, 1, 130, d, generator=generator) * size for d in (head_dim, v_head_dim))
        query = torch.randn(1, 2, 1, head_dim, generator=generator) / size
        check(query, make_states(key, KEY_SPECS[k]), make_states(value, VALUE_SPECS[v]))

    @pytest.mark.parametrize("mode", ["contiguous", "pages"])
    def test_appended_bytes(self, store, mode):
        """All dtypes share the kernel of test_cuda_append.py; here the backend calls it."""
        device = emulator.Device()
        if mode == "pages":
            append = functools.partial(cuda.paged_append, device=device)
            (pool, _), (expected, _) = (
                test_pages.filled(test_pages.CONFIGS["int4"], FLOAT, each, [1, 70]) for each in (append, "reference")
            )
            assert torch.equal(pool.memory, expected.memory)
            return
        key, value = extreme(FLOAT, 2, 2, 150, 64), extreme(FLOAT, 2, 2, 150, 64)
        config = KVQuantConfig.preset("int4")
        window = dict(recent_length=8, sink_length=5, padding=left_padding(150, 0, 30), chunks=(1, 62, 1, 70, 16))
        appends = functools.partial(cuda.quantize_append, device=device), reference.quantize_append
        got, expected = (store(key, value, config.keys, config.values, append=f, **window) for f in appends)
        same_bytes(got, expected)


@needs_nvrtc
class TestInThePtxMachine:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets(self, store, preset):
        check(*stored_problem(store, preset, dtype=FLOAT, kv_len=300), device=ptx_machine.Device())
        sizes = dict(kv_len=71, q_len=3, q_per_kv=3)
        check(*stored_problem(store, preset, dtype=FLOAT, **sizes), device=ptx_machine.Device("sm_80"))

    @pytest.mark.parametrize("preset", ["int8", "int8-plain", "int4"])
    def test_sums_that_are_cut_off(self, store, preset):
        """Tensor cores do not round sums of products. All values are positive, so that such errors add up."""
        query, keys, values = stored_problem(store, preset, dtype=FLOAT, kv_len=2000)
        check(query, keys, values, device=ptx_machine.Device(truncates=True), split=2048, blocks=1)

    def test_values_on_the_channel_grid(self, store):
        both = QuantSpec("int4", "channel")
        config = KVQuantConfig(both, both, sink_length=4, recent_length=32)
        check(*stored_problem(store, config, dtype=FLOAT, kv_len=150, q_len=5), device=ptx_machine.Device())

    def test_latents(self, store):
        query, latents, _ = stored_problem(store, "int8", dtype=FLOAT, head_dim=512, kv_len=71, q_per_kv=16)
        check(query, latents, latents, torch.randn(1, 32, 1, 71), device=ptx_machine.Device())

    def test_attention_and_append_in_pages(self):
        lengths, config, device = [1, 70, 600], test_pages.CONFIGS["int4"], ptx_machine.Device()
        append = functools.partial(cuda.paged_append, device=device)
        (pool, _), (expected, _) = (test_pages.filled(config, FLOAT, each, lengths) for each in (append, "reference"))
        assert torch.equal(pool.memory, expected.memory)
        query, states = test_cuda_pages.queries(len(lengths), 3, FLOAT), pool.layer.states(pool.table(lengths))
        got = test_cuda_pages.paged(query, *states, scaling=0.2, device=device)
        test_cuda_pages.close(got, reference.paged_attention(query, *states, scaling=0.2))


# The file, the text that is replaced and its replacement, and the message; None: a wrong result.
PLANTED = {
    "no second term of a query": ("pass.h", "sum[1][m][e] * (1.0f / kSecondTerm)", "0.0f", None),
    "no second term of a weight": ("pass.h", "scaled[m][e] -= half_low", "scaled[m][e] = 0.0f * half_low", None),
    "no second TF32 term": ("float32.h", "mma_m16n8k8_tf32(c, a_terms[1], b_terms[0]);", "", None),
    "a number that is not TF32": ("float32.h", "bits_float(first)) & kTf32Bits", "bits_float(first))", "no TF32"),
    "another transposition": ("float32.h", "to[1] = prmt(low, high, 0x7632)", "to[1] = prmt(low, high, 0x5410)", None),
    "copies of 16 bits": ("specialisation.h", "kElementBytes = kIsFloat32 ? 4 : 2", "kElementBytes = 2", None),
    "the offset of codes": ("codecs.h", "    Codec::split_centred(word", "    Codec::split(word", None),
}


def check_presets(store):
    for preset in ("int8", "int4"):  # int4 has exact copies of values
        check(*stored_problem(store, preset, dtype=FLOAT, kv_len=150), device=ptx_machine.Device())


@needs_nvrtc
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(store, planted, fault):  # noqa: F811
    file, before, after, said = PLANTED[fault]
    planted(file, before, after)
    with pytest.raises(Fault if said else AssertionError, match=said):
        check_presets(store)
