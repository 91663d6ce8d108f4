"""Pages on the CUDA backend, in the emulator of the sources: bytes are the reference's, and attention is that over
contiguous storage, bit for bit."""

from __future__ import annotations

import functools

import emulator
import pytest
import test_pages
import torch
from test_cuda_attention import TOLERANCE, attend
from test_pages import CONFIGS, DIM, HEADS, LENGTHS, Pool, filled, windowed

from hf_kvquant import QuantSpec, reference
from hf_kvquant.backends import cuda
from hf_kvquant.backends.specialisation import specialisation

HALF, BFLOAT = torch.float16, torch.bfloat16
# At this head_dim the kernels do not take few bits; test_few_bits has another one.
TAKEN = sorted(CONFIGS.keys() - {"few bits"})
# The formats, the channel grid on either side, dense keys.
SOME = ["int4", "fp8", "value blocks", "dense keys"]


def paged(query, keys, values, *rest, **how):
    """Attention over pages in the emulator, or on another device; with one split, of which a warp has 320 columns of
    LENGTHS's last row, more than a page."""
    how = {"split": 4096, "blocks": 1, **how}
    return attend(query, keys, values, *rest, call=cuda.paged_attention, **how)


def close(got, expected):
    (output, logsumexp), (right, right_logsumexp) = got, expected
    tolerance, of_logsumexp = TOLERANCE[output.dtype]
    assert (output - right).float().abs().max() <= tolerance * right.float().abs().max()
    torch.testing.assert_close(logsumexp, right_logsumexp, rtol=of_logsumexp, atol=of_logsumexp)


def queries(rows, q_per_kv, dtype):
    return torch.randn(rows, q_per_kv * HEADS, 1, DIM, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("name", TAKEN)
def test_attention_is_that_of_contiguous_storage_bit_for_bit(name):
    pool, rows = filled(CONFIGS[name], BFLOAT, "cpu")
    query, s_aux = queries(len(LENGTHS), 3, BFLOAT), torch.linspace(-3, 3, 3 * HEADS)
    states = pool.layer.states(pool.table(LENGTHS))
    output, logsumexp = paged(query, *states, s_aux, scaling=0.2)
    close((output, logsumexp), reference.paged_attention(query, *states, s_aux, scaling=0.2))
    for row, (length, whole) in enumerate(zip(LENGTHS, rows)):
        alone = attend(
            query[row : row + 1], *whole(length), None, s_aux, scaling=0.2, split=4096, blocks=1
        )  # fmt: skip
        assert torch.equal(output[row], alone[0][0])
        assert torch.equal(logsumexp[row], alone[1][0])


@pytest.mark.parametrize("window", [1, 130, 400])
@pytest.mark.parametrize("name", SOME)
def test_a_window_over_the_last_pages(name, window):
    """Columns that the window hides are in the table; sinks are seen as long as they are in the window."""
    pool, _ = filled(CONFIGS[name], HALF, "cpu")
    query, states = queries(len(LENGTHS), 2, HALF), pool.layer.states(windowed(pool, LENGTHS, window))
    close(paged(query, *states, scaling=0.2), reference.paged_attention(query, *states, scaling=0.2))


@pytest.mark.parametrize("name", SOME)
def test_sixteen_rows_softcap_and_many_splits(name):
    """Rows of fewer splits than the longest leave the others of their slices unread."""
    pool, _ = filled(CONFIGS[name], BFLOAT, "cpu")
    query, states = queries(len(LENGTHS), 12, BFLOAT), pool.layer.states(pool.table(LENGTHS))
    settings = dict(scaling=0.2, softcap=5.0)
    expected = reference.paged_attention(query, *states, **settings)
    close(paged(query, *states, **settings, split=256, blocks=256), expected)


def test_a_row_is_the_same_alone_and_in_a_batch():
    pool, _ = filled(CONFIGS["int4"], BFLOAT, "cpu")
    query = queries(len(LENGTHS), 4, BFLOAT)
    output, logsumexp = paged(query, *pool.layer.states(pool.table(LENGTHS)), scaling=0.2)
    for row in (1, 4):
        states = pool.layer.states(pool.table([LENGTHS[row]], [row]))
        alone = paged(query[row : row + 1], *states, scaling=0.2)
        assert torch.equal(alone[0][0], output[row]) and torch.equal(alone[1][0], logsumexp[row])


@pytest.mark.parametrize(
    ("page_length", "match"),
    [(96, "whole tiles of 64 columns"), (128, "whole tiles and blocks of the channel grid")],
    ids=["tiles", "blocks"],
)
def test_pages_that_would_part_a_tile_or_a_block_do_not_compile(page_length, match):
    spec = QuantSpec("int4", "channel", block_length=256).resolve(64)
    kind = specialisation(2, spec, spec, 64, 64, page_length=page_length)
    with pytest.raises(RuntimeError, match=match):
        emulator.Device().launch({"decode_attention_kernel": (1, 1, 1)}, kind)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", TAKEN)
def test_appended_bytes_are_the_references(name, dtype):
    """Every byte of the memory, also of those that nobody writes."""
    append = functools.partial(cuda.paged_append, device=emulator.Device())
    (got, _), (expected, _) = (filled(CONFIGS[name], dtype, each) for each in (append, "reference"))
    different = (got.memory != expected.memory).nonzero()[:, 0]
    assert not len(different), (len(different), different[:8].tolist(), got.block_bytes)


def test_few_bits(monkeypatch):
    monkeypatch.setattr(test_pages, "DIM", 64)
    append = functools.partial(cuda.paged_append, device=emulator.Device())
    (pool, _), (expected, _) = (filled(CONFIGS["few bits"], BFLOAT, each) for each in (append, "reference"))
    assert torch.equal(pool.memory, expected.memory)
    query, states = torch.randn(len(LENGTHS), 3 * HEADS, 1, 64).bfloat16(), pool.layer.states(pool.table(LENGTHS))
    close(paged(query, *states, scaling=0.2), reference.paged_attention(query, *states, scaling=0.2))


@pytest.mark.parametrize("name", ["int4", "short blocks"])
def test_rows_of_many_new_tokens_in_one_call(name):
    """Each begins in its own place of a block and of a page, and ends in another page; sinks are its first columns."""
    config, starts, n = CONFIGS[name], [0, 1, 2, 63, 64, 127, 200], 150
    pools, faults = [Pool(config, BFLOAT, [start + n for start in starts]) for _ in range(2)], []
    appends = functools.partial(cuda.paged_append, device=emulator.Device()), reference.paged_append
    for pool, append in zip(pools, appends):
        generator, count = torch.Generator().manual_seed(4), torch.zeros(2, dtype=torch.int64)
        for row, start in enumerate(starts[1:], 1):
            new = torch.randn(2, 1, HEADS, start, DIM, generator=generator).to(BFLOAT)
            append(*new, *pool.layer.states(pool.table([0], [row])), count)
        new = torch.randn(2, len(starts), HEADS, n, DIM, generator=generator).to(BFLOAT)
        new[0, 3, 0, 5, 7] = torch.nan
        append(*new, *pool.layer.states(pool.table(starts)), count)
        faults.append(count.tolist())
    assert torch.equal(pools[0].memory, pools[1].memory)
    assert faults[0] == faults[1] == [1, 0]
