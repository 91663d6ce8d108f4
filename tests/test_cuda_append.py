"""kernels/cuda/quantize_append.cu in the emulator writes the reference's bytes, and touches nothing else."""

from __future__ import annotations

import dataclasses
import functools
import random

import emulator
import pytest
import torch
from extremes import put_extremes
from stored import replaced

from hf_kvquant import QuantSpec, reference
from hf_kvquant.backends import arguments

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SPECS = {
    "int8": QuantSpec("int8"),
    "int8-group16": QuantSpec("int8", group_size=16),
    "int8-group32-rotated": QuantSpec("int8", group_size=32, rotate=True),
    "int8-group48": QuantSpec("int8", group_size=48),
    "int8-channel": QuantSpec("int8", "channel"),
    "int8-channel16": QuantSpec("int8", "channel", block_length=16),
    "fp8": QuantSpec("fp8"),
    "fp8-rotated": QuantSpec("fp8", rotate=True),
    "fp8-channel32": QuantSpec("fp8", "channel", block_length=32),
    "int4-group32": QuantSpec("int4", group_size=32),
    "int4-group64-rotated": QuantSpec("int4", group_size=64, rotate=True),
    "int4-rotated": QuantSpec("int4", rotate=True),
    "int4-channel": QuantSpec("int4", "channel"),
    "int4-channel256": QuantSpec("int4", "channel", block_length=256),
    "int3-group64": QuantSpec("int3", group_size=64),
    "int3-rotated": QuantSpec("int3", rotate=True),
    "int3-channel": QuantSpec("int3", "channel"),
    "int3-channel16": QuantSpec("int3", "channel", block_length=16),
    "int2-group64": QuantSpec("int2", group_size=64),
    "int2-rotated": QuantSpec("int2", rotate=True),
    "int2-channel": QuantSpec("int2", "channel"),
    "dense": QuantSpec("dense"),
}
# Every format, grid, head_dim and dtype; most pairs of them.
CASES = [
    ("int8", "int4-group32", 64, 64, "bf16"),
    ("int8-channel", "int4-group64-rotated", 64, 64, "fp16"),
    ("int4-channel", "int4-group64-rotated", 128, 128, "bf16"),
    ("fp8", "fp8-rotated", 128, 128, "fp16"),
    ("dense", "int8", 128, 64, "bf16"),
    ("int4-rotated", "dense", 80, 80, "bf16"),
    ("int8-channel16", "fp8", 80, 112, "fp32"),
    ("int4-channel", "int8-group48", 96, 96, "fp16"),
    ("int8-group48", "int4-rotated", 192, 96, "fp32"),
    ("fp8-channel32", "int4-rotated", 112, 112, "bf16"),
    ("int8-group16", "int8-group32-rotated", 112, 192, "fp16"),
    ("int4-channel256", "int4-group64-rotated", 256, 256, "bf16"),
    ("fp8-rotated", "int8-group16", 256, 80, "fp32"),
    ("int4-channel", "fp8-rotated", 80, 256, "fp16"),
    ("int8-channel", "dense", 192, 192, "bf16"),
    ("fp8-channel32", "int8", 64, 128, "fp32"),
    ("int8-channel", "int4-channel256", 128, 128, "bf16"),
    ("int4-rotated", "fp8-channel32", 64, 192, "fp16"),
    ("int4-channel256", "int8-channel16", 80, 80, "fp32"),
    ("int8-channel", "int4-rotated", 512, 512, "bf16"),
    ("fp8", "int4-channel256", 512, 512, "fp16"),
    ("int4-group64-rotated", "dense", 512, 512, "bf16"),
    ("dense", "fp8-channel32", 512, 512, "fp32"),
    ("int3-channel", "int2-rotated", 64, 64, "bf16"),
    ("int2-channel", "int3-rotated", 192, 128, "fp16"),
    ("int2-group64", "int3-channel16", 128, 256, "fp32"),
    ("int3-group64", "int2-channel", 512, 512, "bf16"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}-{c[1]}-{c[3]}-{c[4]}")


def left_padding(kv_len, *lengths):
    return torch.arange(kv_len) < torch.tensor(lengths)[:, None]


def macros(call: arguments.Append) -> dict[str, int]:
    k, v = call.keys.side, call.values.side
    return {
        "KVQUANT_DTYPE": call.dtype,
        "KVQUANT_HEAD_DIM": k.head_dim,
        "KVQUANT_V_HEAD_DIM": v.head_dim,
        "KVQUANT_K_FORMAT": k.format,
        "KVQUANT_K_GRID": k.grid,
        "KVQUANT_K_GROUP": k.group_length,
        "KVQUANT_K_ROTATE": k.rotate,
        "KVQUANT_V_FORMAT": v.format,
        "KVQUANT_V_GRID": v.grid,
        "KVQUANT_V_GROUP": v.group_length,
        "KVQUANT_V_ROTATE": v.rotate,
    }


def append(key, value, keys, values, faults, padding=None, *, start, appends=None, parts=3, arch=800, threads=128):
    """The kernel as `reference.quantize_append`."""
    call = arguments.append(key, value, keys, values, faults, padding, start, appends=appends)
    reads = [key, value, padding] + [keys.device_length] * (appends is None)
    writes = [keys.sink_positions, faults] + [keys.device_length] * (appends is not None)
    for states in (keys, values):
        writes += states.stored
    grid = (parts, 2 * call.num_kv_heads, call.batch)
    compiled_for = {**macros(call), "KVQUANT_THREADS": threads}
    emulator.Device(arch).launch(
        {"quantize_append_kernel": grid}, compiled_for, call, appends, reads=reads, writes=writes
    )


def extreme(dtype, batch, heads, kv_len, head_dim):
    """Tokens with outliers, zeros, subnormals, constants, NaN and infinities, in the layout of a projection."""
    x = torch.randn(batch, heads, kv_len, head_dim)
    x *= 1 + 6 * (torch.rand(1, heads, 1, head_dim) > 0.95)
    x += torch.randn(1, heads, 1, head_dim)
    return put_extremes(x, dtype).transpose(1, 2).contiguous().transpose(1, 2)


def same_bytes(got, expected):
    for side, a, b in zip(("keys", "values"), got, expected):
        for name in ("data", "scale", "zero_point", "recent", "sink", "sink_positions"):
            x, y = getattr(a, name), getattr(b, name)
            if x is not None:
                x, y = x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
                different = (x != y).nonzero()
                assert not len(different), (
                    side,
                    name,
                    len(different),
                    different[0].tolist(),
                    x[x != y][:4],
                    y[x != y][:4],
                )


def both(store, case, kv_len, *, padding=None, tokens=None, **window):
    """The states that the kernel and the reference store, and both counts of faults."""
    k, v, head_dim, v_head_dim, dtype = case
    dtype = DTYPES[dtype]
    make = tokens or functools.partial(extreme, dtype)
    key, value = make(2, 2, kv_len, head_dim), make(2, 2, kv_len, v_head_dim)
    faults = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    got, expected = (
        store(key, value, SPECS[k], SPECS[v], padding=padding, append=f, faults=count, **window)
        for f, count in zip((append, reference.quantize_append), faults)
    )
    return got, expected, faults


@every_case
def test_bytes_equal_the_definition(store, case):
    got, expected, faults = both(store, case, 150, padding=left_padding(150, 0, 30), recent_length=8, sink_length=5)
    same_bytes(got, expected)
    assert torch.equal(*faults) and faults[0][0] > 0 and faults[0][1] == 0


CHUNKS = (1, 63, 1, 1, 62, 127, 2, 200, 16, 16, 32, 1, 78)


@pytest.mark.parametrize(
    "case", [CASES[i] for i in (0, 2, 6, 9, 11, 14, 16, 23)], ids=lambda c: f"{c[0]}-{c[2]}-{c[4]}"
)
def test_chunks_equal_the_reference(store, case):
    padding = left_padding(590, 0, 40)
    got, expected, faults = both(
        store, case, 600, padding=padding, recent_length=8, sink_length=70, chunks=CHUNKS, capacity=640
    )
    same_bytes(got, expected)
    assert torch.equal(*faults)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_a_long_append_wraps_around_the_ring(store, parts):
    """It wraps onto the slots of the columns that its first block needs, which another block of threads reads."""
    x = torch.randn(1, 1, 500, 64).half()
    kv = (x, x.flip(1), SPECS["int4-channel"], SPECS["int8"])
    chunks, window = (40, 400, 50, 10), dict(recent_length=8, sink_length=2)
    got = store(*kv, chunks=chunks, append=functools.partial(append, parts=parts), **window)
    same_bytes(got, store(*kv, chunks=chunks, append=reference.quantize_append, **window))


def test_e4m3_with_the_instruction(store):
    x = extreme(torch.bfloat16, 2, 2, 70, 64)
    kv = (x, x.flip(2), SPECS["fp8-channel32"], SPECS["fp8-rotated"])
    same_bytes(store(*kv, append=functools.partial(append, arch=890)), store(*kv, append=reference.quantize_append))


def test_blocks_of_other_sizes(store):
    x, padding = extreme(torch.bfloat16, 2, 2, 300, 128), left_padding(300, 0, 30)
    kv = (x, x.flip(2), SPECS["int4-channel"], SPECS["int4-group64-rotated"])
    window = dict(padding=padding, recent_length=20, sink_length=3, chunks=(100, 5, 195))
    expected = store(*kv, append=reference.quantize_append, **window)
    for threads in (64, 256):
        same_bytes(store(*kv, append=functools.partial(append, threads=threads), **window), expected)


def stored(store, n, **window):
    """Two equal copies of states that hold n columns, in storage for 140."""
    x = torch.randn(2, 1, n, 64).bfloat16()
    kv = (x, x.flip(1), SPECS["int8-channel"], SPECS["int4-group32"])
    return [store(*kv, capacity=140, append=reference.quantize_append, **window) for _ in range(2)]


def with_length(states, length):
    return [dataclasses.replace(s, device_length=length) for s in states]


@pytest.mark.parametrize("short", ["keys", "values"])
@pytest.mark.parametrize("n", [1, 39, 40, 41])
def test_the_length_is_the_devices_and_tokens_without_room_are_dropped(store, n, short):
    got, expected = (with_length(s, torch.tensor(89)) for s in stored(store, 89))
    for states in (got, expected):
        i = short == "values"
        states[i] = replaced(states[i], data=states[i].data[:, :, :129])
    new = torch.randn(2, 1, n, 64).bfloat16()
    new[0, 0, 0, 0] = torch.inf
    faults = [torch.tensor([7, 9]) for _ in range(2)]
    append(new, new, *got, faults[0], start=0)
    reference.quantize_append(new, new, *expected, faults[1], start=0)
    same_bytes(got, expected)
    assert faults[0].tolist() == faults[1].tolist() == ([7, 9 + n] if n > 40 else [9, 9])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("n", [1, 39, 41])
def test_an_append_counts_itself_on_the_device(store, n, parts):
    """Each block of threads reads the length before it is raised. Of 140 columns 99 are taken; 41 are left."""
    got, expected = (with_length(s, torch.tensor(99)) for s in stored(store, 99))
    counts = [torch.tensor([0, 5]) for _ in range(2)]
    faults = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    new = torch.randn(2, 1, n, 64).bfloat16()
    for _ in range(2):  # the second time without room, except for one token
        append(new, new, *got, faults[0], start=0, appends=counts[0], parts=parts)
        reference.quantize_append(new, new, *expected, faults[1], start=0, appends=counts[1])
    same_bytes(got, expected)
    assert counts[0].tolist() == counts[1].tolist() == [0, 7]
    assert int(got[0].device_length) == int(expected[0].device_length) == 99 + 2 * n
    assert faults[0].tolist() == faults[1].tolist() == [0, n if n > 1 else 0]


def test_a_counter_of_appends_needs_a_length_on_the_device(store):
    states, new, count = stored(store, 50)[0], torch.zeros(2, 1, 1, 64).bfloat16(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="appends: .* beside length None are not allowed"):
        append(new, new, *states, count, start=50, appends=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"appends: \(3,\) of torch.int64 .* expected \(2,\)"):
        append(new, new, *with_length(states, torch.tensor(50)), count, start=0, appends=count.new_zeros(3))


def test_sinks_of_columns_that_were_cropped_are_free(store):
    padding = left_padding(90, 0, 46)
    got, expected = stored(store, 50, sink_length=40, padding=padding[:, :50])
    new, count = torch.randn(2, 1, 70, 64).bfloat16(), torch.zeros(2, dtype=torch.int64)
    padding[0, 5:9] = True
    for start, n in ((3, 50), (53, 17)):
        append(new[:, :, :n], new[:, :, :n], *got, count, padding, start=start)
        reference.quantize_append(new[:, :, :n], new[:, :, :n], *expected, count, padding, start=start)
        same_bytes(got, expected)


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_appends_and_crops(store, seed):
    choose = random.Random(seed)
    k, v, head_dim, v_head_dim, dtype = choose.choice(CASES)
    capacity = choose.choice([130, 256, 611])
    padding = torch.rand(2, choose.randrange(1, capacity)) < choose.choice([0, 0.1, 0.9])
    make = functools.partial(extreme, DTYPES[dtype], 2, 2)
    columns = [make(capacity, d) for d in (head_dim, v_head_dim)]
    start = choose.randrange(1, capacity)
    window = dict(recent_length=choose.choice([0, 1, 70]), sink_length=choose.choice([0, 3, 33]))
    first = [x[:, :, :start] for x in columns]
    got, expected = (
        store(*first, SPECS[k], SPECS[v], capacity=capacity, append=reference.quantize_append, **window)
        for _ in range(2)
    )
    faults = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    for _ in range(8):
        if choose.random() < 0.3:
            start = choose.randrange(max(start - 64, 0), start + 1)
        n = min(choose.choice([1, 1, 2, 17, 64, 200]), capacity - start)
        if n == 0:
            continue
        new = [x[:, :, start : start + n] * choose.choice([1, -2]) for x in columns]
        append(*new, *got, faults[0], padding, start=start, parts=choose.choice([1, 2, 5]))
        reference.quantize_append(*new, *expected, faults[1], padding, start=start)
        same_bytes(got, expected)
        assert torch.equal(*faults)
        start += n


def test_nothing_outside_of_the_storage_is_written(store):
    (keys, values), _ = stored(store, 100)
    short = replaced(values, data=values.data[:, :, :100], scale=values.scale[:, :, :100])
    new, count = torch.randn(2, 1, 3, 64).bfloat16(), torch.zeros(2, dtype=torch.int64)
    call = arguments.append(new, new, keys, values, count, None, 100)
    reads, writes = [new], [keys.data, keys.recent, short.data[1], short.scale[1], count]
    with pytest.raises(emulator.Fault, match=r"quantize_append_kernel, .* writes .* bytes at byte"):
        emulator.Device().launch(
            {"quantize_append_kernel": (1, 2, 2)}, macros(call), call, None, reads=reads, writes=writes
        )
