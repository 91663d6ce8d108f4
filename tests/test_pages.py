"""Pages: bytes and attention over them are those of contiguous storage, on every backend."""

import dataclasses
import functools

import pytest
import torch
from levels import LEVELS

from hf_kvquant import KVQuantConfig, ops
from hf_kvquant.backends import cpu
from hf_kvquant.measure.families import PRESETS
from hf_kvquant.pages import LayerPages, PagedLayer, page_table
from hf_kvquant.states import QuantizedStates
from hf_kvquant.storage import Side

HEADS, DIM, PAGE = 2, 32, 128
LENGTHS = [1, 63, 64, 130, 300, 1100]

CONFIGS = {name: KVQuantConfig.preset(name) for name in PRESETS}
CONFIGS["short blocks"] = KVQuantConfig.from_dict({
    "keys": {"format": "int8", "grid": "channel", "block_length": 16},
    "values": {"format": "int4", "grid": "token", "group_size": 16},
    "sink_length": 3, "recent_length": 20,
})  # fmt: skip
CONFIGS["value blocks"] = KVQuantConfig.from_dict({
    "keys": {"format": "int8"}, "values": {"format": "int4", "grid": "channel", "block_length": 64}, "sink_length": 3,
})  # fmt: skip
CONFIGS["few bits"] = KVQuantConfig.from_dict({
    "keys": {"format": "int3", "grid": "channel"}, "values": {"format": "int2", "rotate": True}, "sink_length": 3,
})  # fmt: skip
CONFIGS["dense keys"] = KVQuantConfig.from_dict({
    "keys": {"format": "dense"}, "values": {"format": "int8", "grid": "token"}, "sink_length": 2, "recent_length": 70,
})  # fmt: skip


def poisoned(num_blocks, nbytes):
    """Memory in which every number of every dtype that was not written is a NaN, or close to it."""
    return torch.full((num_blocks * nbytes,), 0xFF, dtype=torch.uint8)


class Pool:
    """Two layers' pages in one tensor; blocks are handed out in a scrambled order."""

    def __init__(self, config, dtype, lengths, seed=0):
        layout = LayerPages.of(config, 0, HEADS, DIM, dtype, PAGE)
        self.block_bytes = 2 * max(layout.page_bytes, layout.exact_bytes)
        counts = [-(-(n + 70) // PAGE) for n in lengths]
        total = sum(counts) + len(lengths) + 3
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        self.blocks = [[order.pop() for _ in range(n)] for n in counts]
        self.exact = [order.pop() for _ in lengths] if layout.exact_bytes else None
        self.memory, self.num_blocks = poisoned(total, self.block_bytes), total
        first = self.block_bytes // 2
        self.layer = PagedLayer(layout, config, self.memory, first, first, self.block_bytes, PAGE)

    def table(self, lengths, rows=None):
        rows = range(len(lengths)) if rows is None else rows
        exact = None if self.exact is None else [self.exact[r] for r in rows]
        return page_table([self.blocks[r] for r in rows], exact, lengths, self.num_blocks)


def contiguous(config, key, value):
    """Keys and values of one row in contiguous storage, and a function that appends to it."""
    sides = [
        Side(spec.resolve(DIM), x, 2048, config.sink_length, config.recent_length)
        for spec, x in zip(config.for_layer(0), (key, value))
    ]
    sinks = torch.full((1, config.sink_length), -1, dtype=torch.int32)

    def states(length):
        return [
            QuantizedStates(s.spec, s.stored, sinks, length, config.recent_length, DIM, key.dtype, config.backend)
            for s in sides
        ]

    return states


def tokens(n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, HEADS, n, DIM, generator=generator)
    x[..., 3] *= 20
    return x.to(dtype)


APPENDS = {"cpu": cpu.paged_append, "reference": ops.reference.paged_append}


def filled(config, dtype, backend, lengths=LENGTHS, steps=3, factors=(None, None)):
    """A pool with `lengths` tokens in its rows, the last `steps` one by one, and the same in contiguous storage.
    `backend`: a name, or a function that appends."""
    pool, rows, faults = Pool(config, dtype, lengths), [], torch.zeros(2, dtype=torch.int64)
    append = functools.partial(APPENDS.get(backend, backend), factors=factors)
    news = [tokens(n, dtype, seed) for seed, n in enumerate(lengths)]
    for row, (key, value) in enumerate(news):
        n = max(key.shape[2] - steps, 0)
        rows.append(contiguous(config, key, value))
        if n:
            append(key[:, :, :n], value[:, :, :n], *pool.layer.states(pool.table([0], [row])), faults)
        ops.quantize_append(key, value, *rows[-1](0), faults, start=0, factors=factors)
    for step in range(steps):
        alive = [row for row, n in enumerate(lengths) if n > step]
        starts = [max(lengths[row] - steps, 0) + step for row in alive]
        key, value = (
            torch.cat([news[row][side][:, :, at : at + 1] for row, at in zip(alive, starts)]) for side in (0, 1)
        )
        append(key, value, *pool.layer.states(pool.table(starts, alive)), faults)
    return pool, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_instruction_set_reads_the_numbers_of_the_definition(name, dtype):
    pool, _ = filled(CONFIGS[name], dtype, "cpu")
    table = pool.table(LENGTHS)
    for states in pool.layer.states(table):
        if states.spec.is_dense:
            continue
        for row, length in enumerate(LENGTHS):
            expected = states.past(row)
            for level in LEVELS:
                room = states.past(row, 5, functools.partial(cpu.paged_read, isa=level))
                assert room.shape[2] == length + 5 and torch.equal(room[:, :, :length], expected), level
            assert torch.equal(ops.paged_past(states, row), expected)


def test_a_read_to_another_place_is_refused():
    pool, _ = filled(CONFIGS["int8"], torch.float32, "cpu")
    keys, _ = pool.layer.states(pool.table(LENGTHS))
    for shape, dtype in (((1, HEADS, 64, DIM), torch.float32), ((1, HEADS, 63, DIM), torch.float16)):
        with pytest.raises(ValueError, match="output: .* is not allowed"):
            cpu.paged_read(keys, 1, torch.empty(shape, dtype=dtype))
    with pytest.raises(ValueError, match="output: .* is not allowed"):
        cpu.paged_read(keys, 1, torch.empty(1, 63, HEADS, DIM).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_are_those_of_contiguous_storage(name, backend, dtype):
    config = CONFIGS[name]
    pool, rows = filled(config, dtype, backend)
    for row, (length, states) in enumerate(zip(LENGTHS, rows)):
        for paged, whole in zip(pool.layer.states(pool.table(LENGTHS)), states(length)):
            got = paged.row(row)
            block = whole.spec.block_length or 1
            n = length - length % block
            assert torch.equal(got.data[:, :, :n].view(torch.uint8), whole.data[:, :, :n].view(torch.uint8))
            for field in ("scale", "zero_point"):
                old, new = getattr(whole, field), getattr(got, field)
                if old is not None:
                    count = length // block
                    assert torch.equal(new[:, :, :count].view(torch.int16), old[:, :, :count].view(torch.int16))
            # The next query reads the same numbers, exact ones included.
            assert torch.equal(got.read(0), whole.read(0))
            assert torch.equal(got.read(1), whole.read(1))
            assert torch.equal(paged.past(row), whole.read(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_that_of_contiguous_storage_bit_for_bit(name, softcap, dtype):
    config = CONFIGS[name]
    pool, rows = filled(config, dtype, "cpu")
    query = torch.randn(len(LENGTHS), 3 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(9)).to(dtype)
    s_aux = torch.randn(3 * HEADS, generator=torch.Generator().manual_seed(8)) if softcap else None
    output, logsumexp = ops.paged_attention(
        query, *pool.layer.states(pool.table(LENGTHS)), s_aux, scaling=0.2, softcap=softcap
    )
    for row, (length, states) in enumerate(zip(LENGTHS, rows)):
        alone = ops.decode_attention(query[row : row + 1], *states(length), None, s_aux, scaling=0.2, softcap=softcap)
        assert torch.equal(output[row], alone[0][0])
        assert torch.equal(logsumexp[row], alone[1][0])


def windowed(pool, lengths, window):
    """A table of the pages that the next query of each row sees, and a mask of all columns for the same."""
    firsts = [max(0, n - window) // PAGE for n in lengths]
    table = page_table(
        [blocks[first:] for blocks, first in zip(pool.blocks, firsts)], pool.exact,
        [n - first * PAGE for n, first in zip(lengths, firsts)], pool.num_blocks, [first * PAGE for first in firsts],
    )  # fmt: skip
    columns = torch.arange(table.pages.shape[1] * PAGE)
    return table._replace(seen=columns >= (table.lengths - window)[:, None])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [1, 5, 130, 400, 2000])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_window_over_the_last_pages_hides_what_a_mask_over_all_hides(name, window, backend):
    """Sinks, too, are seen as long as they are in the window."""
    config = CONFIGS[name]
    pool, rows = filled(config, torch.float32, "cpu")
    query = torch.randn(len(LENGTHS), 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(9))
    table = windowed(pool, LENGTHS, window)
    attend = {"cpu": cpu, "reference": ops.reference}[backend].paged_attention
    output, logsumexp = attend(query, *pool.layer.states(table), scaling=0.2)
    for row, (length, states) in enumerate(zip(LENGTHS, rows)):
        keys, values = states(length)
        sinks = torch.arange(config.sink_length, dtype=torch.int32)
        sinks = torch.where(sinks < length, sinks, -1)[None]
        keys, values = (dataclasses.replace(x, sink_positions=sinks) for x in (keys, values))
        mask = (torch.arange(length) >= length - window)[None]
        alone = ops.reference.decode_attention(query[row : row + 1], keys, values, mask, scaling=0.2)
        # Few columns average little of the rounding of the weights, which is 2e-5 (eval/results/NOTES.md).
        torch.testing.assert_close(output[row], alone[0][0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(logsumexp[row], alone[1][0], rtol=1e-4, atol=1e-5)
        dropped = int(table.dropped[row])
        for paged, whole in zip(pool.layer.states(table), states(length)):
            assert torch.equal(paged.past(row), whole.read(0)[:, :, dropped:])


@pytest.mark.parametrize("isa", cpu.info()["available"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_over_pages_is_the_references(name, isa):
    pool, _ = filled(CONFIGS[name], torch.float32, "cpu")
    query = torch.randn(len(LENGTHS), 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(9))
    states = pool.layer.states(pool.table(LENGTHS))
    got = cpu.paged_attention(query, *states, scaling=0.2, isa=isa)
    expected = ops.reference.paged_attention(query, *states, scaling=0.2)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_threads_and_neighbours_do_not_matter():
    pool, _ = filled(CONFIGS["int4"], torch.float32, "cpu", [2000, 5, 900, 1500], steps=1)
    query = torch.randn(4, HEADS, 1, DIM)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            lengths = [2000, 5, 900, 1500]
            results.append(ops.paged_attention(query, *pool.layer.states(pool.table(lengths)), scaling=0.2)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = ops.paged_attention(query[2:3], *pool.layer.states(pool.table([900], [2])), scaling=0.2)[0]
    assert torch.equal(alone[0], results[0][2])


def test_what_does_not_fit_is_named():
    for given, expected in ((96, "multiple of 64"), (32, "multiple of 64")):
        with pytest.raises(ValueError, match=f"page_size: {given} is not allowed.*{expected}"):
            LayerPages.of(CONFIGS["int8-plain"], 0, HEADS, DIM, torch.float32, given)
    with pytest.raises(ValueError, match=r"layer 0: keys\.head_dim: 20 cannot be quantized"):
        LayerPages.of(CONFIGS["int4"], 0, HEADS, 20, torch.float32, PAGE)
    long = KVQuantConfig.from_dict(CONFIGS["int4"].to_dict() | {"recent_length": 200})
    with pytest.raises(ValueError, match="page_size: 128 is not allowed; expected at least 200"):
        LayerPages.of(long, 0, HEADS, DIM, torch.float32, 128)
    with pytest.raises(ValueError, match="blocks: .* is not allowed; expected 0 to 8"):
        page_table([[9]], None, [1], 9)
    pool, _ = filled(CONFIGS["int4"], torch.float32, "cpu", [5])
    query = torch.randn(1, HEADS, 1, DIM)
    with pytest.raises(ValueError, match="table: .* do not fit"):
        ops.paged_attention(query, *pool.layer.states(pool.table([4096])), scaling=1.0)
    with pytest.raises(ValueError, match="table: .* do not fit"):
        ops.paged_attention(query, *pool.layer.states(pool.table([0])), scaling=1.0)
    table = windowed(pool, [5], 3)
    with pytest.raises(ValueError, match=r"table seen: torch.bool \(1, 3\) on cpu is not allowed"):
        ops.paged_attention(query, *pool.layer.states(table._replace(seen=table.seen[:, :3])), scaling=1.0)
    with pytest.raises(ValueError, match="query: .* does not fit"):
        ops.paged_attention(torch.randn(1, HEADS, 2, DIM), *pool.layer.states(pool.table([5])), scaling=1.0)
