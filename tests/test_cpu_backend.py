"""The CPU backend equals the reference: attention within a tolerance, written bytes bit for bit."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from levels import LEVELS, check
from stored import (
    KEY_SPECS,
    VALUE_SPECS,
    extreme,
    left_padding,
    make_states,
    no_faults,
    problem,
    random_states,
    replaced,
    same_bytes,
)

from hf_kvquant import reference
from hf_kvquant.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("k", KEY_SPECS)
def test_key_formats(k, dtype):
    check(*problem(k, "int8", dtype=dtype, kv_len=300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v", VALUE_SPECS)
def test_value_formats(v, dtype):
    check(*problem("int8-channel", v, dtype=dtype, kv_len=300))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("k", "v"),
    [("int8", "int8"), ("fp8", "fp8-rotated"), ("int4-rotated", "int4-rotated"), ("int4-channel", "int4-rotated"),
     ("int8-channel", "dense"), ("dense", "fp8"), ("int3-channel", "int3-rotated"), ("int2-channel", "int8")],
)  # fmt: skip
def test_head_dims(k, v, head_dim, dtype):
    check(*problem(k, v, head_dim=head_dim, kv_len=70, dtype=dtype, q_per_kv=3, num_kv_heads=1))


@pytest.mark.parametrize("q_per_kv", [1, 2])
@pytest.mark.parametrize("head_dim", [48, 128])
@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("int8", "int8-group16"),
        ("int4-rotated", "int4-rotated"),
        ("int8-channel", "int4-rotated"),
        ("int4-channel", "int8"),
    ],
)
def test_few_query_rows(k, v, head_dim, q_per_kv):
    check(*problem(k, v, head_dim=head_dim, q_per_kv=q_per_kv, dtype=torch.bfloat16))


CHANNEL_SPECS = [name for name, spec in KEY_SPECS.items() if spec.is_channel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 512])
@pytest.mark.parametrize("k", CHANNEL_SPECS)
def test_latents_on_the_channel_grid(k, head_dim, dtype):
    """Latents are keys and values at once, so values are on the channel grid too; many heads share them."""
    shape = {"head_dim": head_dim, "kv_len": 300, "num_kv_heads": 1, "q_per_kv": 13, "dtype": dtype}
    query, latents, _ = problem(k, q_len=2, recent_length=5, sink_length=3, **shape)
    check(query, latents, latents)


@pytest.mark.parametrize("k", CHANNEL_SPECS)
def test_latents_whose_rows_see_different_columns(k):
    query, latents, _ = problem(k, batch=2, head_dim=64, kv_len=300, num_kv_heads=1, q_per_kv=4, q_len=3)
    mask = torch.rand(2, 4, 3, 300, generator=torch.Generator().manual_seed(3)) > 0.3
    check(query, latents, latents, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("k", ["int8", "int8-channel", "int4-rotated", "int4-channel"])
def test_the_largest_sums(k, head_dim, dtype):
    """Every code and every weight is the largest or smallest possible one: integer sums must not overflow."""
    sign = torch.ones(1, 1, 128, 1)
    sign[:, :, ::3] = -1
    x = (sign * torch.ones(head_dim)).to(dtype)
    # After rotation one channel holds the whole vector.
    states = (
        make_states(x, KEY_SPECS[k]),
        make_states(x, KEY_SPECS["int8" if k.startswith("int8") else "int4-rotated"]),
    )
    for query in (x[:, :, :1], x[:, :, 1:2]):
        check(query.contiguous(), *states)
        check(query.contiguous(), states[0], states[0])


@pytest.mark.parametrize("level", LEVELS)
def test_every_fp8_code_is_exact(level):
    """One token: its score is an element of the key, and the output is the value. Codes include subnormal numbers."""
    elements = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    elements = elements[elements.isfinite()]
    x = elements[:, None, None, None].repeat(1, 1, 1, 32)
    x[..., 0] = 448  # so the scale is 1
    states = make_states(x, KEY_SPECS["fp8"])
    query = torch.zeros_like(x)
    query[..., 5] = 1
    output, lse = cpu.decode_attention(query, states, states, scaling=1.0, isa=level)
    assert torch.equal(lse[:, 0, 0], elements) and torch.equal(output, x)


def test_keys_and_values_of_different_head_dim():
    check(*problem("int8-channel", "int4-rotated", head_dim=192, v_head_dim=128, kv_len=200))


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 130, 1000, 2500])
@pytest.mark.parametrize(("k", "v"), [("int8", "int8"), ("int4-channel", "int4-rotated"), ("fp8", "dense")])
def test_lengths(k, v, kv_len):
    check(*problem(k, v, kv_len=kv_len, num_kv_heads=1))
    check(
        *problem(
            k, v, kv_len=kv_len, num_kv_heads=1, q_per_kv=4, dtype=torch.bfloat16, recent_length=24, sink_length=4
        )
    )


@pytest.mark.parametrize(
    ("q_per_kv", "q_len"),
    [
        (1, 1),
        (1, 2),
        (1, 16),
        (2, 1),
        (2, 7),
        (3, 1),
        (3, 3),
        (4, 1),
        (4, 16),
        (5, 2),
        (8, 1),
        (8, 9),
        (16, 1),
        (16, 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grouped_queries(q_per_kv, q_len, dtype):
    check(*problem("int8-channel", "int4", q_per_kv=q_per_kv, q_len=q_len, num_kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("kv_len", [17, 64, 71, 525])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (32, 4), (100, 1)], ids=lambda w: f"recent{w[0]}-sink{w[1]}")
@pytest.mark.parametrize(("k", "v"), [("int4-channel", "int4-rotated"), ("fp8-channel32", "fp8"), ("int8", "dense")])
def test_windows_across_blocks(k, v, window, kv_len):
    recent_length, sink_length = window
    dtype = torch.bfloat16 if kv_len % 2 else torch.float32
    check(
        *problem(
            k, v, kv_len=kv_len, q_len=16, q_per_kv=1, num_kv_heads=1, recent_length=recent_length,
            sink_length=sink_length, dtype=dtype,
        )
    )  # fmt: skip


def test_sink_ring_of_rows_that_have_no_sink_yet():
    padding = left_padding(66, 0, 64)
    mask = (~padding).long()
    check(*problem("int4", "int4", kv_len=66, batch=2, sink_length=4, recent_length=8, padding=padding), mask)


@pytest.mark.parametrize("kind", ["int64", "bool", "int32", "float32"])
def test_padding_mask(kind):
    kv_len, padding = 200, left_padding(200, 0, 70, 199)
    arguments = problem("int8-channel", "int8", batch=3, q_len=1, kv_len=kv_len, sink_length=2, padding=padding)
    check(*arguments, (~padding).to(getattr(torch, kind)))
    arguments = problem("int8-channel", "int8", batch=3, q_len=4, kv_len=kv_len, padding=padding)
    check(*arguments, (~padding).to(getattr(torch, kind)))
    check(*arguments, (~padding).to(getattr(torch, kind))[:1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 8, 5), (1, 8, 1), (1, 1, 5)], ids=str)
def test_complete_mask(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    kv_len = 150
    visible = torch.rand(*shape, kv_len, generator=generator) > 0.3
    columns = torch.arange(kv_len)
    visible &= columns <= kv_len - shape[2] + torch.arange(shape[2])[:, None]
    if dtype == torch.bool:
        mask = visible
    else:
        mask = torch.randn(*shape, kv_len, generator=generator).to(dtype)
        mask = torch.where(visible, mask, torch.finfo(dtype).min)
        mask[..., 3] = -torch.inf
    arguments = dict(batch=2, num_kv_heads=2, q_per_kv=4, q_len=5, kv_len=kv_len)
    check(*problem("int8", "int4", **arguments), mask)
    check(*problem("int4-channel", "fp8", **arguments, recent_length=16, dtype=torch.bfloat16), mask)


def test_a_strided_mask():
    mask = torch.rand(1, 1, 2, 300, generator=torch.Generator().manual_seed(2))[..., ::2] > 0.5
    check(*problem(q_len=2, kv_len=150), mask)


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_that_sees_nothing_returns_zeros(level):
    query, keys, values = problem(batch=2, kv_len=80, dtype=torch.bfloat16)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1] = False
    output, lse = cpu.decode_attention(query, keys, values, mask, scaling=0.1, isa=level)
    assert output[1].eq(0).all() and lse[1].eq(-torch.inf).all()
    assert output[0].ne(0).any() and lse[0].isfinite().all()
    s_aux = torch.arange(4.0)
    output, lse = cpu.decode_attention(query, keys, values, mask, s_aux, scaling=0.1, isa=level)
    assert output[1].eq(0).all() and torch.equal(lse[1, :, 0], s_aux)


@pytest.mark.parametrize("kv_len", [5, 600])
def test_softcap_and_learned_sinks(kv_len):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = problem("int8", "int8", kv_len=kv_len, q_per_kv=4, q_len=2, dtype=dtype)
        s_aux = torch.linspace(-3, 9, 8).to(dtype)
        check(*arguments, softcap=7.5)
        check(*arguments, None, s_aux)
        check(*arguments, None, s_aux, softcap=20.0)


def test_sinks_need_positions():
    query, keys, values = problem("int8-channel", "int8", recent_length=4, sink_length=2)
    with pytest.raises(ValueError, match="sink_positions: None is not allowed beside stored sinks"):
        cpu.decode_attention(query, replace(keys, sink_positions=None), values, scaling=0.1)


class TestTensorsAreCheckedOnce:
    """The first call remembers at a `Stored` that its tensors fit; a call with anything else is checked again."""

    @pytest.fixture
    def used(self):
        query, keys, values = problem("int8-channel", "int8", recent_length=4, sink_length=2)
        cpu.decode_attention(query, keys, values, scaling=0.1)
        return query, keys, values

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda q, k, v: (q, replaced(k, scale=k.scale[:, :, :1]), v), "keys: the stored tensors do not fit"),
            (lambda q, k, v: (q, replaced(k, recent=k.recent.half()), v), "keys: dtype torch.float16 does not fit"),
            (lambda q, k, v: (q, k, replaced(v, data=v.data[:, :, :9])), "values: the stored tensors do not fit"),
            (lambda q, k, v: (q, k, replace(v, spec=VALUE_SPECS["int4"])), "values: the stored tensors do not fit"),
            (
                lambda q, k, v: (q, *(replace(s, length=k.capacity + 1) for s in (k, v))),
                "keys: the stored tensors do not fit",
            ),
            (lambda q, k, v: (q.half(), k, v), "dtype torch.float32 does not fit; expected torch.float16"),
            (lambda q, k, v: (q.expand(2, -1, -1, -1), k, v), r"sink_positions: .* does not fit"),
            (
                lambda q, k, v: (q, *(replace(s, sink_positions=s.sink_positions[:, :1]) for s in (k, v))),
                "keys: the stored tensors do not fit",
            ),
            (
                lambda q, k, v: (q, *(replace(s, sink_positions=s.sink_positions.long()) for s in (k, v))),
                "sink_positions: .* of torch.int64 on cpu does not fit",
            ),
        ],
        ids=["scale", "ring", "data", "spec", "length", "dtype", "batch", "sinks", "sinks' dtype"],
    )
    def test_something_else(self, change, message, used):
        with pytest.raises(ValueError, match=message):
            cpu.decode_attention(*change(*used), scaling=0.1)
        cpu.decode_attention(*used, scaling=0.1)

    @pytest.mark.parametrize("name", ["data", "scale", "recent", "sink"])
    def test_tensors_without_memory(self, name, used):
        """torch numbers device meta as the CPU."""
        query, keys, values = used
        keys = replaced(keys, **{name: getattr(keys, name).to("meta")})
        message = f"keys: the stored tensors do not fit: .*{name} [^;]* on meta"
        if name == "data":
            message = "sink_positions: .* on cpu does not fit; expected .* on meta"
        with pytest.raises(ValueError, match=message):
            cpu.decode_attention(query, keys, values, scaling=0.1)

    def test_copies_remember_nothing(self, used):
        stored = used[1].stored
        assert stored.layout is not None and stored.sinks[0] is used[1].sink_positions
        moved = stored.transformed(torch.clone)
        for other in (copy.deepcopy(stored), moved, stored._replace(sink=None), type(stored)._make(stored)):
            assert other.layout is None and other.sinks[0] is None


@pytest.mark.parametrize("level", LEVELS)
def test_a_score_of_minus_infinity_weighs_nothing(level):
    key, value = (random_states(torch.Generator().manual_seed(seed), 1, 1, 70, 32, torch.float32) for seed in (5, 6))
    query = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(7))
    query[..., 3] = 1
    key[0, 0, 9, 3] = key[0, 0, 66, 3] = -torch.inf
    states = [make_states(x, KEY_SPECS["dense"]) for x in (key, value)]
    expected = reference.decode_attention(query, *states, scaling=0.1)
    torch.testing.assert_close(cpu.decode_attention(query, *states, scaling=0.1, isa=level), expected)
    key[..., 3] = -torch.inf
    states = [make_states(x, KEY_SPECS["dense"]) for x in (key, value)]
    output, lse = cpu.decode_attention(query, *states, scaling=0.1, isa=level)
    assert (output == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("k", "v"), [("int8", "int8"), ("int4", "fp8"), ("dense", "dense")])
def test_a_bad_token_is_seen_only_by_the_rows_that_see_it(k, v, level):
    key = random_states(torch.Generator().manual_seed(3), 2, 1, 100, 64, torch.bfloat16)
    value = key.flip(-1).contiguous()
    clean = [make_states(x.clone(), KEY_SPECS[s]) for x, s in ((key, k), (value, v))]
    value[0, :, 40, 7] = torch.nan
    bad = [make_states(x, KEY_SPECS[s]) for x, s in ((key, k), (value, v))]
    query = torch.randn(2, 2, 1, 64, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    mask = torch.ones(2, 2, 1, 100, dtype=torch.bool)
    mask[0, 1, 0, 40] = False
    expected, _ = cpu.decode_attention(query, *clean, mask, scaling=0.1, isa=level)
    output, _ = cpu.decode_attention(query, *bad, mask, scaling=0.1, isa=level)
    assert output[0, 0].isnan().any()
    torch.testing.assert_close(output[0, 1], expected[0, 1], rtol=1e-2, atol=1e-2)
    assert torch.equal(output[1], expected[1])


def of_large_blocks(k: str, large: float):
    """A channel of one block is `large` times as large, and that of queries as much smaller."""
    shape = 1, 1, 2100, 64
    key, value = (random_states(torch.Generator().manual_seed(seed), *shape, torch.bfloat16) for seed in (1, 2))
    key[:, :, 64 * 20 : 64 * 21, 5] *= large
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    query[..., 5] /= large
    return query, make_states(key, KEY_SPECS[k]), make_states(value, VALUE_SPECS["int8"])


@pytest.mark.parametrize("k", CHANNEL_SPECS)
@pytest.mark.parametrize("large", [1, 30, 1000])
def test_blocks_of_other_sizes_in_one_range(k, large):
    check(*of_large_blocks(k, large))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", ["int8-channel", "int4-channel"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_hidden_block_that_is_not_finite_changes_nothing(k, bad, level):
    query, keys, values = of_large_blocks(k, 1)
    mask = torch.ones(1, 4, 1, 2100, dtype=torch.bool)
    mask[..., 64 * 20 : 64 * 21] = False
    expected, _ = cpu.decode_attention(query, keys, values, mask, scaling=0.125, isa=level)
    scale = keys.scale.clone()
    scale[:, :, 20] = bad
    output, _ = cpu.decode_attention(query, replaced(keys, scale=scale), values, mask, scaling=0.125, isa=level)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("k", ["int8-channel", "int4-channel"])
def test_keys_that_are_all_zero_points(k, dtype):
    """A block of one key repeated has scales of 0, or next to nothing, and so have all products with them."""
    query, _, values = problem(dtype=dtype, kv_len=1300, num_kv_heads=1)
    key = torch.randn(1, 1, 21, 64, generator=torch.Generator().manual_seed(8)).repeat_interleave(64, dim=2)
    keys = make_states(key[:, :, :1300].to(dtype), KEY_SPECS[k])
    check(query, keys, values)
    check(query, replaced(keys, scale=torch.zeros_like(keys.scale)), values)


@pytest.mark.parametrize("level", LEVELS)
def test_splits_of_a_long_row_are_longer(level):
    """1,024 columns, from 65,536 columns on 2,048, and from 131,072 on 4,096."""
    shape = 1, 1, 140_000, 16
    key, value = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    query = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(3))
    states = [make_states(x, KEY_SPECS["int8"]) for x in (key, value)]
    threads = torch.get_num_threads()
    for length in (65_535, 65_537, 70_000, 131_071, 140_000):
        part = [replace(s, length=length) for s in states]
        expected = reference.decode_attention(query, *part, scaling=0.25)
        output = cpu.decode_attention(query, *part, scaling=0.25, isa=level)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        try:
            torch.set_num_threads(3)
            again = cpu.decode_attention(query, *part, scaling=0.25, isa=level)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again[0], output[0]) and torch.equal(again[1], output[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("k", "v"), [("int8", "int8"), ("int4-channel", "int4-rotated"), ("fp8", "fp8")])
def test_threads_and_batch_do_not_change_a_bit(k, v, level):
    arguments = dict(batch=3, kv_len=1700, q_per_kv=4, dtype=torch.bfloat16, recent_length=20)
    query, keys, values = problem(k, v, **arguments)

    def run(rows):
        parts = [replace(s, stored=s.stored.transformed(lambda x: x[rows])) for s in (keys, values)]
        return cpu.decode_attention(query[rows], *parts, scaling=0.125, isa=level)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        output, lse = run(slice(None))
        for n in (2, 3, 8):
            torch.set_num_threads(n)
            again = run(slice(None))
            assert torch.equal(again[0], output) and torch.equal(again[1], lse)
    finally:
        torch.set_num_threads(threads)
    for row in range(3):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0][0], output[row]) and torch.equal(alone[1][0], lse[row])


def test_python_threads_at_once():
    arguments = problem("int8-channel", "int8", kv_len=4000, q_per_kv=4, dtype=torch.bfloat16)
    expected = cpu.decode_attention(*arguments, scaling=0.125)[0]
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(cpu.decode_attention(*arguments, scaling=0.125)[0], expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.fixture
def own_threads():
    """Without torch's OpenMP runtime the library has threads of its own."""
    library = cpu._library()
    library.kvquant_use_openmp(None)
    yield
    library.kvquant_use_openmp(ctypes.c_void_p(cpu._openmp_parallel()))


@pytest.mark.parametrize("level", LEVELS)
def test_own_threads(own_threads, level):
    query, keys, values = problem("int4-channel", "int8", kv_len=4000, q_per_kv=4, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(cpu.decode_attention(query, keys, values, scaling=0.125, isa=level)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is elsewhere")
def test_torchs_threads_are_shared():
    assert cpu.info()["thread pool"] == "torch's OpenMP"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork():
    arguments = problem("int8", "int8", kv_len=4000, q_per_kv=4, dtype=torch.bfloat16)
    expected = cpu.decode_attention(*arguments, scaling=0.125)[0].view(torch.int16).numpy().tobytes()
    child = os.fork()
    if child == 0:
        same = cpu.decode_attention(*arguments, scaling=0.125)[0].view(torch.int16).numpy().tobytes() == expected
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spec", KEY_SPECS)
def test_bytes_equal_the_definition(spec, dtype, level):
    padding = left_padding(150, 0, 30)
    for head_dim in (64, 96, 80):
        if head_dim % (KEY_SPECS[spec].group_size or 16):
            continue
        x = extreme(dtype, head_dim)
        # The layout that a projection gives: [batch, n, heads, head_dim] in memory.
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        expected, states = (make_states(x[:, :, :0], KEY_SPECS[spec], recent_length=8, slack=155) for _ in range(2))
        count, expected_count = no_faults(), no_faults()
        reference.quantize_append(x, x[:, :, :0], expected, expected, expected_count, padding, start=0)
        cpu.quantize_append(x, x[:, :, :0], states, states, count, padding, start=0, isa=level)
        same_bytes(states, expected)
        assert torch.equal(count, expected_count) and count[0] > 0


@pytest.mark.parametrize(
    "k", ["int8-channel", "int4-channel", "int4-channel256", "int3-channel", "int8", "int4-rotated", "dense"]
)
def test_chunks_equal_all_at_once(k):
    x = random_states(torch.Generator().manual_seed(6), 2, 2, 600, 64, torch.bfloat16)
    padding = left_padding(590, 0, 40)
    count = no_faults()
    specs = (KEY_SPECS[k], KEY_SPECS["int4-rotated"])
    once, chunked = ([make_states(x[:, :, :0], s, recent_length=8, slack=605) for s in specs] for _ in range(2))
    cpu.quantize_append(x, x, *once, count, padding, start=0)
    start = 0
    for n in (1, 63, 1, 1, 62, 127, 2, 200, 16, 16, 16, 1, 94):
        part = x[:, :, start : start + n]
        cpu.quantize_append(part, part, *chunked, count, padding, start=start)
        start += n
    assert start == 600
    for a, b in zip(once, chunked):
        same_bytes(a, b)
    assert not count.any()


def test_a_long_prompt_on_two_threads():
    x = random_states(torch.Generator().manual_seed(7), 1, 2, 3000, 128, torch.bfloat16)
    states, expected = (
        [make_states(x[:, :, :0], KEY_SPECS[s], slack=3000) for s in ("int4-channel", "int4-rotated")]
        for _ in range(2)
    )
    count = no_faults()
    cpu.quantize_append(x, x, *states, count, start=0)
    reference.quantize_append(x, x, *expected, count, start=0)
    for a, b in zip(states, expected):
        same_bytes(a, b)


def test_an_instruction_set_that_this_processor_lacks_is_refused():
    lacking = set(cpu._instruction_sets()[0]) - set(LEVELS)
    if not lacking:
        pytest.skip("this processor has every instruction set")
    for level in lacking:
        message = f"KVQUANT_CPU_ISA: instruction set '{level}' does not run on this processor"
        with pytest.raises(ValueError, match=message):
            cpu.decode_attention(*problem(), scaling=1.0, isa=level)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_avx_vnni_has_its_instruction():
    """Few machines have AVX-VNNI, so this looks for its instruction in the library."""
    assert "avx2_vnni" in cpu._instruction_sets()[0]
    code = subprocess.run(["objdump", "-d", cpu._path()], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\{vex\} vpdpwssd .*%ymm", code)


def test_refusals_name_the_cause():
    query, keys, values = problem()
    with pytest.raises(ValueError, match="dtype: torch.float64"):
        cpu.decode_attention(query.double(), keys, values, scaling=1.0)
    with pytest.raises(ValueError, match="mask: dtype torch.int64"):
        cpu.decode_attention(query, keys, values, torch.ones(1, 1, 1, 130, dtype=torch.long), scaling=1.0)
    with pytest.raises(ValueError, match="instruction set 'sse9' is unknown"):
        cpu.decode_attention(query, keys, values, scaling=1.0, isa="sse9")
    x = torch.randn(1, 2, 9, 64)
    with pytest.raises(ValueError, match="key: shape"):
        cpu.quantize_append(x, x, keys, values, no_faults(), start=130)
