"""kernels/cuda/decode_attention.cu in the emulator equals the reference."""

from __future__ import annotations

import dataclasses

import emulator
import pytest
import torch
from stored import KEY_SPECS, VALUE_SPECS, left_padding, make_states, problem, random_states, replaced

from hf_kvquant import QuantSpec, reference
from hf_kvquant.backends import cuda, specialisation

# The largest error of an output, relative to the largest value, and of a log-sum-exp. 16-bit attention itself rounds
# queries, weights and output to the dtype, by at most 2^-11 or 2^-8 each. float32: see test_cuda_float32.py.
TOLERANCE = {torch.float16: (2e-3, 3e-3), torch.bfloat16: (8e-3, 3e-3), torch.float32: (2**-16, 2**-15)}
HALF, BFLOAT = torch.float16, torch.bfloat16
# Two tiles of 32 columns for each warp, four of 16.
SPLIT = 256

# Every format, grid, group size, head_dim and dtype; most pairs of them.
CASES = [
    ("int8-channel", "int8", 64, 64, BFLOAT),
    ("int8", "int4", 64, 64, HALF),
    ("int4-channel", "int4-rotated", 128, 128, BFLOAT),
    ("int4-rotated", "int4-rotated", 128, 128, HALF),
    ("fp8", "fp8", 128, 64, BFLOAT),
    ("dense", "int8-rotated", 64, 128, BFLOAT),
    ("int4-rotated", "dense", 80, 80, BFLOAT),
    ("int8-channel16", "fp8-rotated", 80, 112, HALF),
    ("int4-channel", "int4-rotated", 80, 80, HALF),
    ("fp8-channel32", "int4-rotated", 112, 112, BFLOAT),
    ("int4-channel256", "int4", 112, 192, HALF),
    ("int8-rotated", "int4", 96, 96, BFLOAT),
    ("int8-group16", "int8-group16", 192, 64, HALF),
    ("int4", "fp8", 192, 192, BFLOAT),
    ("int8-channel", "int8", 256, 256, HALF),
    ("fp8-rotated", "int4", 256, 256, BFLOAT),
    ("dense", "dense", 128, 128, HALF),
    ("int8-channel", "int4-channel", 128, 128, BFLOAT),
    ("int8-channel16", "int4-channel", 80, 80, HALF),
    ("int4-channel256", "fp8-channel32", 64, 112, BFLOAT),
    ("int4-rotated", "int8-channel16", 192, 192, HALF),
    ("dense", "int8-channel", 64, 256, BFLOAT),
    ("int8-channel", "int8-channel", 512, 512, BFLOAT),
    ("int8", "int8", 512, 512, BFLOAT),
    ("fp8", "fp8", 512, 512, HALF),
    ("int4-rotated", "int4-rotated", 512, 512, BFLOAT),
    ("int4-channel", "dense", 512, 512, HALF),
    ("dense", "fp8", 512, 64, BFLOAT),
    ("int3-channel", "int3-rotated", 128, 128, BFLOAT),
    ("int3-group64", "int2-rotated", 192, 64, HALF),
    ("int2-group64", "int3-channel16", 64, 192, BFLOAT),
    ("int2-channel", "int3-group64", 512, 512, HALF),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[1]}-{c[3]}-{str(c[4])[6:]}")
FEW = [CASES[1], CASES[2]]  # the token grid; the channel grid and rotated values
few_cases = pytest.mark.parametrize("case", FEW, ids=["token", "channel"])
# Values on the channel grid: blocks as long as those of keys, longer and shorter ones; beside keys on the token grid.
VALUES = [CASES[17], CASES[18], ("int8-channel", "fp8-channel32", 64, 64, HALF), CASES[20]]
channel_values = pytest.mark.parametrize("case", VALUES, ids=["as long", "longer", "shorter", "token keys"])


def of(case, **sizes):
    k, v, head_dim, v_head_dim, dtype = case
    return problem(k, v, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, **sizes)


def attend(*arguments, split=SPLIT, blocks=specialisation.BLOCKS, device=None, call=cuda.decode_attention, **settings):
    """The backend's own call in the emulator, or on another `device`, with short splits, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specialisation, "SPLIT", split)
        patch.setattr(specialisation, "UNIT", min(split, specialisation.UNIT))
        patch.setattr(specialisation, "BLOCKS", blocks)
        patch.setattr(specialisation, "_made", {})
        return call(*arguments, **settings, device=device or emulator.Device())


def check(query, keys, values, mask=None, s_aux=None, *, softcap=0.0, scaling=None, **how):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = dict(scaling=scaling, softcap=softcap)
    expected = reference.decode_attention(query, keys, values, mask, s_aux, **settings)
    return close(attend(query, keys, values, mask, s_aux, **how, **settings), expected)


def close(got, wanted):
    (output, lse), (expected, expected_lse) = got, wanted
    tolerance, lse_tolerance = TOLERANCE[output.dtype]
    assert torch.equal(output.isnan(), expected.isnan())
    seen = expected.float().nan_to_num()
    error = (output.float().nan_to_num() - seen).abs().max().item()
    assert error <= tolerance * max(seen.abs().max().item(), 1e-6), error
    torch.testing.assert_close(lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance, equal_nan=True)
    return output, lse


@every_case
def test_formats(case):
    check(*of(case, kv_len=330, q_per_kv=4, num_kv_heads=1))
    check(*of(case, kv_len=150, q_per_kv=3, q_len=3, num_kv_heads=1, recent_length=20, sink_length=3))


@pytest.mark.parametrize("case", [CASES[4], CASES[9]], ids=["token", "channel"])
def test_fp8_with_the_conversions_of_sm_89(case):
    device = emulator.Device(arch=890)
    check(*of(case, kv_len=330, num_kv_heads=1), device=device)
    # Codes of NaN where nobody looks.
    query, keys, values = of(case, kv_len=150, num_kv_heads=1)
    hidden = torch.zeros(150, dtype=torch.bool)
    hidden[[0, 5, 60, 149]] = True
    mask = ~hidden[None, None, None]
    output, _ = attend(query, poisoned(keys, hidden), poisoned(values, hidden), mask, scaling=0.1, device=device)
    assert torch.equal(output, attend(query, keys, values, mask, scaling=0.1, device=device)[0])


@pytest.mark.parametrize("kv_len", [1, 63, 64, 130, 1000])
@few_cases
def test_lengths(case, kv_len):
    check(*of(case, kv_len=kv_len, num_kv_heads=1, batch=2))
    check(*of(case, kv_len=kv_len, num_kv_heads=2, q_per_kv=4, recent_length=24, sink_length=4))


@pytest.mark.parametrize(
    ("q_per_kv", "q_len"), [(1, 1), (4, 1), (8, 1), (7, 1), (1, 3), (7, 3), (1, 16), (4, 16), (1, 32)]
)
@few_cases
def test_grouped_queries(case, q_per_kv, q_len):
    check(*of(case, q_per_kv=q_per_kv, q_len=q_len, kv_len=200, recent_length=10, sink_length=1))


@pytest.mark.parametrize("kv_len", [17, 64, 71, 325])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (32, 4), (100, 1)], ids=lambda w: f"recent{w[0]}-sink{w[1]}")
@few_cases
def test_windows_across_blocks(case, window, kv_len):
    recent_length, sink_length = window
    sizes = dict(kv_len=kv_len, q_len=16, q_per_kv=1, num_kv_heads=1)
    check(*of(case, **sizes, recent_length=recent_length, sink_length=sink_length))


@pytest.mark.parametrize("kv_len", [64, 71, 306])
@channel_values
def test_windows_across_blocks_of_values(case, kv_len):
    """Sixteen queries, of which the first reads up to two blocks more from copies than the last. At 306 the copies of
    the first begin with its recent tokens, within a block, and those of the last with a block of 64."""
    sizes = dict(kv_len=kv_len, q_len=16, q_per_kv=1, num_kv_heads=1)
    check(*of(case, **sizes))
    check(*of(case, **sizes, recent_length=40, sink_length=4))


@channel_values
def test_few_rows_over_blocks_of_values(case):
    """Eight rows at most, whose blocks are summed up on their own; warps begin and end within blocks."""
    check(*of(case, kv_len=1000, num_kv_heads=1, batch=2))
    padding = left_padding(300, 170, 3)
    check(*of(case, batch=2, kv_len=300, q_len=2, sink_length=4, padding=padding), ~padding)
    check(*of(case, kv_len=300, q_per_kv=4, recent_length=16), None, torch.linspace(-3, 6, 8), softcap=2.5)


@pytest.mark.parametrize("split", [128, 512])
def test_split_sizes(split):
    check(*of(FEW[1], kv_len=1100, recent_length=8, sink_length=4, num_kv_heads=1), split=split)


@pytest.mark.parametrize("case", [FEW[0], VALUES[0]], ids=["token", "channel values"])
def test_long_splits(case):
    """A warp has 768 columns, more than a word has bits for; only the second word has hidden columns."""
    states = of(case, kv_len=3000, num_kv_heads=1)
    check(*states, split=4096, blocks=1)
    mask = torch.arange(3000) % 768 < torch.tensor([700, 768, 750, 768]).repeat_interleave(768)[:3000]
    check(*states, mask[None, None, None], split=4096, blocks=1)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_the_length_decides_the_splits(blocks):
    """Each of two heads has 1, 1, 2 or 4 blocks, of 1024, 1024, 512 or 256 columns."""
    check(*of(FEW[1], kv_len=1000, recent_length=8, sink_length=4, num_kv_heads=2), split=1024, blocks=blocks)


@pytest.mark.parametrize("num_kv_heads", [1, 6, 8, 300])
def test_the_grid_has_room_for_every_shorter_length(num_kv_heads):
    """A static cache is launched for the columns that it may have; blocks are split by those that it has."""
    splits, most = [], specialisation.most_splits
    for kv_len in [*range(1, 3000, 7), *range(3000, 2_000_000, 9973)]:
        length = specialisation.split_length(kv_len, num_kv_heads)
        assert length % specialisation.UNIT == 0 and length <= specialisation.SPLIT
        splits.append(-(-kv_len // length))
        assert max(splits) <= most(kv_len, num_kv_heads)


MASK_DTYPES = [torch.bool, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=["bool", "int32", "int64"])
@few_cases
def test_padding_mask(case, dtype):
    padding = left_padding(300, 170, 0, 3)
    states = of(case, batch=3, kv_len=300, q_len=3, recent_length=16, sink_length=4, padding=padding)
    check(*states, (~padding).to(dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, HALF, BFLOAT], ids=["bool", "fp32", "fp16", "bf16"])
def test_complete_masks(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(*shape, 140, generator=generator)
    hidden = torch.rand(*shape, 140, generator=generator) < 0.4
    mask = ~hidden if dtype == torch.bool else mask.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
    check(*of(FEW[1], batch=2, kv_len=140, q_len=3, recent_length=16, sink_length=2), mask)
    # Additive masks of transformers hold 0 or hide.
    if dtype.is_floating_point:
        check(*of(FEW[0], batch=2, kv_len=140, q_len=3), mask.masked_fill(~hidden, 0.0))


@few_cases
def test_rows_without_keys_are_zeros(case):
    mask = torch.ones(1, 1, 3, 140, dtype=torch.bool)
    mask[:, :, 1] = False
    output, lse = check(*of(case, kv_len=140, q_len=3, recent_length=16, sink_length=2), mask)
    assert (output[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()


@few_cases
def test_learned_sinks_and_softcap(case):
    states = of(case, kv_len=300, q_per_kv=4, recent_length=16)
    s_aux = torch.linspace(-3, 6, 8)
    check(*states, None, s_aux)
    check(*states, softcap=2.5)
    check(*states, None, s_aux, softcap=30.0)


def poisoned(states, hidden):
    """The same states with everything that is stored for the hidden columns replaced by NaN or NaN codes of fp8."""
    data, scale, recent = states.data.clone(), None, None
    columns = hidden.nonzero()[:, 0]
    if states.spec.is_dense:
        data[:, :, columns] = torch.nan
    else:
        data[:, :, columns] = 0xFF
    if states.scale is not None:
        scale = states.scale.clone()
        if not states.spec.is_channel:
            scale[:, :, columns] = torch.nan
    if states.recent is not None:
        recent = states.recent.clone()
        recent[:, :, columns[columns >= len(hidden) - recent.shape[2]] % recent.shape[2]] = torch.nan
    return replaced(states, data=data, scale=scale, recent=recent)


@pytest.mark.parametrize("by_row", [False, True], ids=["all-rows", "some-rows"])
@pytest.mark.parametrize(
    "case", [CASES[4], *FEW, CASES[6], VALUES[2]], ids=["fp8", "token", "channel", "dense", "channel values"]
)
def test_hidden_columns_may_hold_anything(case, by_row):
    query, keys, values = of(case, kv_len=150, q_len=2, num_kv_heads=1, recent_length=30)
    hidden = torch.zeros(150, dtype=torch.bool)
    hidden[[0, 5, 60, 100, 125, 149]] = True
    mask = ~hidden[None, None, None].repeat(1, 1, 2, 1)
    if by_row:  # row 1 sees columns that row 0 does not: row 1 is NaN, row 0 is not
        mask[:, :, 1] = True
    bad = (query, poisoned(keys, hidden), poisoned(values, hidden), mask)
    output, _ = attend(*bad, scaling=0.1)
    clean, _ = attend(query, keys, values, mask, scaling=0.1)
    assert torch.equal(output[:, :, 0], clean[:, :, 0])
    if by_row:
        assert output[:, :, 1].isnan().any()
        fp8 = "fp8" in (keys.spec.format, values.spec.format)
        if not fp8:  # NaN codes of fp8 are never stored, and are finite here
            check(*bad, scaling=0.1)


def test_an_infinite_value_reaches_those_who_see_it():
    query, keys, values = of(CASES[6], kv_len=40, q_len=3, num_kv_heads=1)
    values.data[:, :, 38, 5] = torch.inf
    values.data[:, :, 39, 7] = -torch.inf
    check(query, keys, values)


@pytest.mark.parametrize("case", [*FEW, VALUES[0]], ids=["token", "channel", "channel values"])
def test_what_is_not_written_is_not_read(case):
    """Storage beyond the length is NaN in all of these tests; here the length is on the device, below its limit."""
    query, keys, values = of(case, kv_len=130, q_len=2, recent_length=16, sink_length=4)
    expected, expected_lse = attend(query, keys, values, scaling=0.1)
    capacity = values.data.shape[2]
    length = torch.tensor(130)
    limits = [dataclasses.replace(s, length=capacity, device_length=length) for s in (keys, values)]
    output, lse = attend(query, *limits, scaling=0.1)
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    mask = torch.ones(1, 1, 1, capacity, dtype=torch.bool)
    output, _ = attend(query, *limits, mask, scaling=0.1)
    torch.testing.assert_close(output, attend(query, keys, values, mask[..., :130], scaling=0.1)[0], rtol=0, atol=0)


@few_cases
def test_a_row_is_the_same_alone_and_in_a_batch(case):
    query, keys, values = of(case, batch=3, kv_len=300, q_per_kv=4, recent_length=16, sink_length=4)
    output, lse = attend(query, keys, values, scaling=0.1)

    def row(states):
        stored = states.stored.transformed(lambda x: x[1:2])
        return dataclasses.replace(states, stored=stored, sink_positions=states.sink_positions[1:2])

    alone, alone_lse = attend(query[1:2], row(keys), row(values), scaling=0.1)
    assert torch.equal(alone[0], output[1]) and torch.equal(alone_lse[0], lse[1])


@pytest.mark.parametrize("case", [*FEW, CASES[4], VALUES[0]], ids=["token", "channel", "fp8", "channel values"])
def test_many_light_columns_beside_a_heavy_one(case):
    """Weights of 1e-6, of values 1000 times larger than the heavy column's, must not vanish in FP16."""
    k, v, head_dim, v_head_dim, dtype = case
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 512, head_dim, generator=generator).to(dtype) * 0.01
    value = (torch.rand(1, 1, 512, v_head_dim, generator=generator) * 50 + 50).to(dtype)
    query = torch.ones(1, 4, 1, head_dim, dtype=dtype)
    key[:, :, 3], value[:, :, 3] = 14.0 / head_dim, 0.05
    value[:, :, :40] /= 128  # scales grow from tile to tile, and so do the sums
    states = make_states(key, KEY_SPECS[k]), make_states(value, VALUE_SPECS[v])
    check(query, *states, scaling=1.0, split=512)


@pytest.mark.parametrize("size", [1e-4, 1.0, 3000.0])
@pytest.mark.parametrize("case", [*FEW, VALUES[0]], ids=["token", "channel", "channel values"])
def test_large_and_small_numbers(case, size):
    k, v, head_dim, v_head_dim, dtype = case
    generator = torch.Generator().manual_seed(0)
    key = random_states(generator, 1, 1, 130, head_dim, torch.float32)
    value = random_states(generator, 1, 1, 130, v_head_dim, torch.float32)
    query = torch.randn(1, 2, 1, head_dim, generator=generator)
    states = make_states((key * size).to(dtype), KEY_SPECS[k]), make_states((value * size).to(dtype), VALUE_SPECS[v])
    check((query / size).to(dtype), *states)


def test_query_with_gaps():
    query, keys, values = of(FEW[0], kv_len=70, q_len=2)
    wide = torch.randn(1, 2, 4, 3 * 64 + 2).to(query.dtype)
    check(wide.transpose(1, 2)[..., 2:66], keys, values)


def test_a_copy_of_values_only():
    """Dense keys have no ring and no sinks; quantized values beside them have."""
    check(*of(CASES[5], kv_len=150, q_len=5, recent_length=20, sink_length=3))


# -- latents and rotary keys --------------------------------------------------------------------------

# The formats of latents and of rotary keys, their head_dims and dtype.
LATENTS = {
    "int8": ("int8-channel", "int8-channel", 512, 64, BFLOAT),
    "int8-plain": ("int8", "int8", 512, 64, HALF),
    "fp8": ("fp8", "fp8", 64, 64, BFLOAT),
    "int4": ("int4-channel", "int4-channel", 64, 64, HALF),
    "int4-small": ("int4-rotated", "int4-rotated", 128, 64, BFLOAT),
    "fp8-channel": ("fp8-channel32", "fp8-channel32", 256, 32, HALF),
    "groups": ("int8-group16", "int8-group16", 64, 64, BFLOAT),
    "groups of int4": ("fp8", "int4", 64, 96, HALF),
    "half a chunk": ("int4-channel", "int4-channel", 80, 80, BFLOAT),
    "other formats": ("int8-channel16", "int4-channel16", 64, 128, HALF),
    "few bits": ("int3-channel", "int2-channel", 64, 128, HALF),
    "dense": ("dense", "dense", 64, 64, BFLOAT),
}
KEY_SPECS_OF_ROTARY = KEY_SPECS | {"int4-channel16": QuantSpec("int4", "channel", block_length=16)}
every_latent = pytest.mark.parametrize("case", LATENTS.values(), ids=LATENTS)
few_latents = pytest.mark.parametrize("case", [LATENTS["fp8"], LATENTS["int4"]], ids=["token", "channel"])


def latents(case, *, batch=1, kv_len=150, q_per_kv=16, q_len=1, padding=None, **windows):
    """Queries of latents and of rotary keys, and both states."""
    latent, rotary, rank, rotary_dim, dtype = case
    generator = torch.Generator().manual_seed(0)
    states = []
    for name, head_dim in ((latent, rank), (rotary, rotary_dim)):
        x = random_states(generator, batch, 1, kv_len, head_dim, dtype)
        states.append(make_states(x, KEY_SPECS_OF_ROTARY[name], padding=padding, **windows))
    # Both parts of a score are equally large, so that neither hides an error of the other.
    queries = (
        torch.randn(batch, q_per_kv, q_len, d, generator=generator) * (rank / d) ** 0.5 for d in (rank, rotary_dim)
    )
    return *(q.to(dtype) for q in queries), *states


def of_latents(query, rotary_query, states, rotary, mask=None, s_aux=None, *, scaling):
    """The reference: the scores of rotary keys are a mask."""
    added = reference.rotary_mask(rotary_query, rotary, mask, scaling)
    return reference.decode_attention(query, states, states, added, s_aux, scaling=scaling)


def latent_attention(query, rotary_query, states, rotary, *masks, **settings):
    return cuda.decode_attention(query, states, states, *masks, rotary=(rotary_query, rotary), **settings)


def check_latents(query, rotary_query, states, rotary, mask=None, s_aux=None, **how):
    assert cuda.reads_rotary_keys(states, rotary)
    arguments, settings = (
        (query, rotary_query, states, rotary, mask, s_aux),
        dict(scaling=(2 * query.shape[-1]) ** -0.5),
    )
    got = attend(*arguments, call=latent_attention, **how, **settings)
    return close(got, of_latents(*arguments, **settings))


@every_latent
def test_rotary_keys(case):
    check_latents(*latents(case, kv_len=330))
    check_latents(*latents(case, q_len=3, recent_length=20, sink_length=3))


@few_latents
def test_rotary_keys_at_other_lengths(case):
    for kv_len in (1, 63, 64, 130, 1000):
        check_latents(*latents(case, kv_len=kv_len, batch=2))
    check_latents(*latents(case, kv_len=71, q_len=16, q_per_kv=1, recent_length=10, sink_length=4))
    check_latents(*latents(case, kv_len=600, q_per_kv=20))


@few_latents
def test_rotary_keys_under_masks(case):
    padding = left_padding(170, 70, 3)
    window = dict(kv_len=170, recent_length=16, sink_length=4)
    check_latents(*latents(case, batch=2, q_len=2, padding=padding, **window), ~padding)
    hidden = torch.rand(1, 16, 3, 170, generator=torch.Generator().manual_seed(1)) < 0.4
    states = latents(case, q_len=3, **window)
    check_latents(*states, ~hidden)
    bias = torch.randn(1, 16, 3, 170).masked_fill(hidden, torch.finfo(torch.float32).min)
    check_latents(*states, bias, torch.linspace(-3, 6, 16))


@few_latents
def test_hidden_rotary_keys_may_hold_anything(case):
    query, rotary_query, states, rotary = latents(case, recent_length=30)
    hidden = torch.zeros(150, dtype=torch.bool)
    hidden[[0, 5, 60, 100, 125, 149]] = True
    mask, call = ~hidden[None, None, None], dict(call=latent_attention, scaling=0.1)
    clean, _ = attend(query, rotary_query, states, rotary, mask, **call)
    output, _ = attend(query, rotary_query, states, poisoned(rotary, hidden), mask, **call)
    assert torch.equal(output, clean)


@few_latents
def test_rotary_keys_whose_number_the_device_knows(case):
    query, rotary_query, *both = latents(case, kv_len=130, recent_length=16, sink_length=4)
    expected, _ = attend(query, rotary_query, *both, call=latent_attention, scaling=0.1)
    capacity, length = both[0].data.shape[2], torch.tensor(130)
    limits = [dataclasses.replace(s, length=capacity, device_length=length) for s in both]
    output, _ = attend(query, rotary_query, *limits, call=latent_attention, scaling=0.1)
    assert torch.equal(output, expected)


def test_rotary_keys_with_other_copies_are_not_read():
    """Their scores are a mask: the queries would read exact copies of one where they read codes of the other."""
    *_, channel, token = latents(("int8-channel", "int8", 64, 64, BFLOAT))
    *_, longer, _ = latents(("int4-channel256", "int8", 64, 64, BFLOAT))
    *_, dense, wide = latents(("dense", "dense", 64, 512, BFLOAT))
    for one, other in ((channel, token), (channel, longer), (dense, token), (channel, wide)):
        assert not cuda.reads_rotary_keys(one, other)
    *_, without = latents(("int8", "int8", 64, 64, BFLOAT))
    *_, copied = latents(("int8", "int8", 64, 64, BFLOAT), recent_length=4)
    assert cuda.reads_rotary_keys(without, without) and not cuda.reads_rotary_keys(without, copied)
