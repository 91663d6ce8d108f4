"""The cache as storage: the stored bytes do not depend on how tokens arrive, and are counted exactly."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import families
import numpy as np
import processes
import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantizedStates, QuantSpec, reference, route
from hf_kvquant.layers import QuantizedLayer
from hf_kvquant.route import learn_route

HEADS, HEAD_DIM = 2, 64
INT8, INT4 = QuantSpec("int8"), QuantSpec("int4", group_size=16, rotate=True)
CHANNEL4, CHANNEL8 = QuantSpec("int4", "channel"), QuantSpec("int8", "channel", block_length=16)
DENSE = QuantSpec("dense")
CONFIGS = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()} | {
    "windows": KVQuantConfig(CHANNEL8, INT4, sink_length=5, recent_length=37),
    "long-window": KVQuantConfig(INT8, INT8, sink_length=3, recent_length=100),
    "dense-keys": KVQuantConfig(DENSE, INT4, sink_length=2, recent_length=8),
    "dense-values": KVQuantConfig(CHANNEL4, DENSE),
}
every_config = pytest.mark.parametrize("kv_config", CONFIGS.values(), ids=CONFIGS.keys())
POSITIVE_CROP_IS_ALLOWED = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)


def new_cache(kv_config, layers: int = 1, **kwargs) -> QuantizedCache:
    config = families.config("llama", num_hidden_layers=layers, head_dim=HEAD_DIM)
    return QuantizedCache(config, kv_config, **kwargs)


def states(length: int, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, head_dim: int = HEAD_DIM):
    """Keys and values `[batch, HEADS, length, head_dim]`; the first tokens of a longer one are a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randn(length, 2, batch, HEADS, head_dim, generator=generator)
    token[..., 3] *= 8
    return tuple(token[:, side].permute(1, 2, 0, 3).to(dtype) for side in (0, 1))


def feed(cache: QuantizedCache, key: torch.Tensor, value: torch.Tensor, chunks=None, layer_idx: int = 0):
    """Append in chunks, like a model whose attention takes the states; return the result of the last update."""
    start, out = 0, None
    for n in chunks or [key.shape[2]]:
        out = cache.update(key[:, :, start : start + n], value[:, :, start : start + n], layer_idx)
        if not isinstance(out[0], QuantizedStates):
            learn_route(*out)
        start += n
    assert start == key.shape[2]
    return out


def stored(cache: QuantizedCache, layer_idx: int = 0) -> dict[str, torch.Tensor]:
    """Everything that later queries can read, by name: bytes of whole columns, the ring by column, sinks."""
    layer = cache.layers[layer_idx]
    positions = layer.sink_positions
    found = {"positions": positions.sort(1).values, "faults": layer.faults}
    for name, side in (("keys", layer._keys), ("values", layer._values)):
        now = layer._states(side)
        length, rows = layer.length, layer.length
        if now.spec.is_channel:
            rows = length // now.spec.block_length
            length = rows * now.spec.block_length
        found[f"{name}.data"] = now.data[:, :, :length]
        if now.scale is not None:
            found[f"{name}.scale"] = now.scale[:, :, :rows]
        if now.zero_point is not None:
            found[f"{name}.zero_point"] = now.zero_point[:, :, :rows]
        if now.recent is not None:
            columns = torch.arange(now.dense_from(layer.length), layer.length)
            found[f"{name}.recent"] = now.recent[:, :, columns % now.recent.shape[2]]
        if now.sink is not None:
            found[f"{name}.sink"] = torch.where((positions >= 0)[:, None, :, None], now.sink, 0)
    return found


def assert_same(a: QuantizedCache, b: QuantizedCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for layer_idx in range(len(a.layers)):
        left, right = stored(a, layer_idx), stored(b, layer_idx)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=f"layer {layer_idx}: {name}")


def decode(cache: QuantizedCache, length: int, n: int = 1, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Append the tokens `length .. length + n` of `states` and attend with queries that depend on the position."""
    key, value = states(length + n, batch, seed=seed)
    keys, values = feed(cache, key[:, :, length:], value[:, :, length:])
    query = states(length + n, batch, seed=7)[0][:, :, length:].repeat_interleave(2, 1)
    return reference.decode_attention(query, keys, values, scaling=HEAD_DIM**-0.5)[0]


# --- append


@every_config
@pytest.mark.parametrize(
    "chunks",
    [[1] * 150, [63, 1, 1, 64, 21], [16] * 9 + [6], [100, 32, 18], [128, 22]],
    ids=["one-by-one", "borders", "sixteens", "uneven", "two-blocks"],
)
def test_bytes_do_not_depend_on_chunks(kv_config, chunks):
    key, value = states(150)
    whole, pieces = new_cache(kv_config), new_cache(kv_config)
    feed(whole, key, value)
    feed(pieces, key, value, chunks)
    assert_same(whole, pieces)
    assert torch.equal(decode(whole, 150), decode(pieces, 150))


@every_config
def test_bytes_do_not_depend_on_capacity(kv_config):
    key, value = states(300)
    grown, reserved = new_cache(kv_config), new_cache(kv_config, max_length=301)
    feed(grown, key, value, [40] + [1] * 260)
    feed(reserved, key, value, [40] + [1] * 260)
    assert_same(grown, reserved)
    assert reserved.layers[0]._keys.capacity == 301


@pytest.mark.parametrize("preset", ["int4", "int8-plain"])
def test_growth_is_amortised(preset):
    cache = new_cache(preset)
    key, value = states(1500, batch=1)
    allocations, capacities = 0, set()
    feed(cache, key[:, :, :10], value[:, :, :10])
    pointer = None
    for i in range(10, 1500):
        cache.update(key[:, :, i : i + 1], value[:, :, i : i + 1], 0)
        now = cache.layers[0]._keys.data.data_ptr()
        allocations += now != pointer
        pointer = now
        capacities.add(cache.layers[0]._keys.capacity)
    # 256 * 1.5**5 > 1500
    assert allocations <= 6
    assert len(capacities) == allocations


def test_reserved_storage_is_allocated_once():
    cache = new_cache("int4", max_length=600)
    key, value = states(600, batch=1)
    feed(cache, key[:, :, :10], value[:, :, :10])
    tensors = [side.data.data_ptr() for side in (cache.layers[0]._keys, cache.layers[0]._values)]
    feed(cache, key[:, :, 10:], value[:, :, 10:], [1] * 590)
    assert tensors == [side.data.data_ptr() for side in (cache.layers[0]._keys, cache.layers[0]._values)]
    cache.reserve(700)
    assert cache.layers[0]._keys.capacity == 700


@pytest.mark.parametrize("length", [np.int64(600), torch.tensor(600)], ids=["numpy", "torch"])
def test_a_length_may_be_any_integer(length):
    made, reserved = new_cache("int4", max_length=length), new_cache("int4")
    for cache in (made, reserved):
        feed(cache, *states(9, batch=1))
    reserved.reserve(length)
    assert made.layers[0]._keys.capacity == reserved.layers[0]._keys.capacity == 600


def test_lengths():
    cache = new_cache("int4", layers=2)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    for layer_idx in (0, 1):
        feed(cache, *states(70), layer_idx=layer_idx)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 70
    assert cache.get_mask_sizes(3, 1) == (73, 0)
    assert not cache.is_sliding[0]
    assert cache.layers[0].keys.shape == (2, HEADS, 70, HEAD_DIM)


def test_route_by_length():
    """Prefill: the given states; up to 32 tokens: as stored; longer: de-quantized past and the new states."""
    cache = new_cache("int4")
    key, value = states(200)
    first = cache.update(key[:, :, :70], value[:, :, :70], 0)
    assert all(torch.equal(a, b[:, :, :70]) for a, b in zip(learn_route(*first), (key, value)))
    short = cache.update(key[:, :, 70:102], value[:, :, 70:102], 0)
    assert all(isinstance(s, QuantizedStates) and s.length == 102 for s in short)
    past = [s.dequantize(position=102) for s in short]
    long = cache.update(key[:, :, 102:135], value[:, :, 102:135], 0)
    for given, was, new in zip(long, past, (key, value)):
        assert torch.equal(given[:, :, :102], was)
        assert torch.equal(given[:, :, 102:], new[:, :, 102:135])
    assert {k: v for k, v in cache.routes.items() if v} == {"prefill_dense": 1, "decode_dequantized": 1}


# --- crop


@every_config
@pytest.mark.parametrize("length", [70, 129, 200])
@pytest.mark.parametrize("removed", [1, 17, 64])
def test_short_crop_is_as_if_the_tokens_never_came(kv_config, length, removed):
    key, value = states(length)
    other = states(length, seed=5)
    cropped, fresh = new_cache(kv_config), new_cache(kv_config)
    kept = length - removed
    feed(
        cropped,
        *(torch.cat([a[:, :, :kept], b[:, :, kept:]], 2) for a, b in zip((key, value), other)),
        [kept, removed],
    )
    cropped.crop(-removed)
    feed(fresh, key[:, :, :kept], value[:, :, :kept])
    assert_same(cropped, fresh)
    assert torch.equal(decode(cropped, kept), decode(fresh, kept))
    more = states(kept + 65)
    for cache in (cropped, fresh):
        feed(cache, *(x[:, :, kept + 1 :] for x in more), [32, 32])
    assert torch.equal(decode(cropped, kept + 65, 4), decode(fresh, kept + 65, 4))
    assert_same(cropped, fresh)
    assert cropped.routes["window_lost"] == 0


def test_crop_beyond_the_window_is_counted_and_reads_dequantized():
    cache = new_cache("int4")
    key, value = states(300)
    feed(cache, key, value)
    route._said.clear()
    with pytest.warns(UserWarning, match="more than 64 tokens"):
        cache.crop(-121)
    assert cache.routes["window_lost"] == 1
    keys = feed(cache, key[:, :, 179:180], value[:, :, 179:180])[0]
    body = keys.body()
    dense, _ = keys.overrides()
    first = keys.dense_from(179)
    # Column 179 is new; the columns before it are copies of the body, close to their original values.
    assert torch.equal(dense[:, :, first:172], body[:, :, first:172])
    assert torch.equal(dense[:, :, 179], key[:, :, 179])
    torch.testing.assert_close(dense[:, :, first:172], key[:, :, first:172], rtol=0, atol=3.0)


def test_crop_of_many_short_steps_loses_the_window_too():
    cache = new_cache("int4")
    feed(cache, *states(300))
    cache.crop(-60)
    assert cache.routes["window_lost"] == 0
    cache.crop(-60)
    assert cache.routes["window_lost"] == 1


def test_growth_after_a_long_crop():
    """At a block's border the ring is not needed; growing must not look for the columns that it lost."""
    cache, fresh = new_cache("int8"), new_cache("int8")
    key, value = states(500)
    feed(cache, key[:, :, :256], value[:, :, :256])
    cache.crop(-192)
    cache.reserve(300)
    feed(cache, key[:, :, 64:], value[:, :, 64:], [20] * 21 + [16])
    feed(fresh, key, value)
    assert_same(cache, fresh)
    assert cache.routes["window_lost"] == 0
    # Tokens appended after the crop are in the ring again, so that a short rollback is exact.
    cache.crop(-64)
    assert cache.routes["window_lost"] == 0
    feed(cache, key[:, :, 436:], value[:, :, 436:])
    assert_same(cache, fresh)


@every_config
def test_crop_to_nothing_starts_again(kv_config):
    cache, fresh = new_cache(kv_config), new_cache(kv_config)
    feed(cache, *states(100, seed=3))
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert not isinstance(feed(cache, *states(90))[0], QuantizedStates)
    feed(fresh, *states(90))
    assert_same(cache, fresh)
    assert cache.routes["prefill_dense"] == 2


def test_crop_of_nothing():
    cache = new_cache("int4")
    cache.crop(-5)
    feed(cache, *states(10))
    cache.crop(0)
    assert cache.get_seq_length() == 10


@pytest.mark.skipif(not POSITIVE_CROP_IS_ALLOWED, reason="from transformers 5.18 on it raises")
def test_positive_crop_keeps_so_many():
    cache = new_cache("int4")
    feed(cache, *states(100))
    cache.crop(70)
    assert cache.get_seq_length() == 70
    cache.crop(100)
    assert cache.get_seq_length() == 70


@pytest.mark.skipif(POSITIVE_CROP_IS_ALLOWED, reason="up to transformers 5.17 it keeps that many tokens")
def test_positive_crop_raises():
    cache = new_cache("int4")
    feed(cache, *states(100))
    with pytest.raises(ValueError, match="positive value"):
        cache.crop(70)
    assert cache.get_seq_length() == 100


# --- batch


@every_config
def test_batch_operations_are_moves_of_rows(kv_config):
    key, value = states(90, batch=4)
    mask = torch.ones(4, 90)
    mask[1, :7] = mask[3, :70] = 0
    beams = torch.tensor([2, 1, 1, 3])

    def cache_of(rows):
        cache = new_cache(kv_config, attention_mask=mask[rows])
        feed(cache, key[rows], value[rows], [80, 10])
        return cache

    everyone = torch.arange(4)
    cache = cache_of(everyone)
    cache.reorder_cache(beams)
    assert_same(cache, cache_of(beams))
    cache = cache_of(everyone)
    cache.batch_repeat_interleave(2)
    assert_same(cache, cache_of(everyone.repeat_interleave(2)))
    cache = cache_of(everyone)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_same(cache, cache_of(torch.tensor([3, 0])))
    expected = cache_of(torch.tensor([3, 0]))
    assert torch.equal(decode(cache, 90, 16), decode(expected, 90, 16))
    # The block with the last padding is complete now: its scales ignore the rows' padding.
    for each in (cache, expected):
        feed(each, *(x[:, :, 106:] for x in states(130)))
    assert_same(cache, expected)


@every_config
def test_reset_serves_another_batch(kv_config):
    mask = torch.ones(2, 100)
    mask[0, :9] = 0
    cache, fresh = new_cache(kv_config, attention_mask=mask), new_cache(kv_config)
    feed(cache, *states(100))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_report()["total"] == 0
    feed(cache, *states(120, batch=3))
    feed(fresh, *states(120, batch=3))
    assert_same(cache, fresh)


@every_config
def test_offload_and_prefetch(kv_config):
    cache, fresh = new_cache(kv_config), new_cache(kv_config)
    feed(cache, *states(100))
    feed(fresh, *states(100))
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert_same(cache, fresh)
    assert torch.equal(decode(cache, 100), decode(fresh, 100))


@every_config
def test_deepcopy_is_independent(kv_config):
    cache = new_cache(kv_config)
    feed(cache, *states(100))
    twin = copy.deepcopy(cache)
    assert_same(cache, twin)
    before = stored(copy.deepcopy(cache))
    assert torch.equal(decode(twin, 100, 30), decode(cache, 100, 30))
    twin.crop(-30)
    decode(twin, 100, 30, seed=4)
    cache.crop(-30)
    for name, tensor in stored(cache).items():
        assert torch.equal(tensor, before[name]), name
    twin._routes["prefill_dense"] += 1
    assert cache.routes["prefill_dense"] == 1
    assert twin.layers[0].routes is twin._routes


# --- padding


def test_padding_never_enters_a_block(outlier):
    """The scales of a row with padding depend on its tokens alone."""
    key, value = outlier(1, HEADS, 64, HEAD_DIM), outlier(1, HEADS, 64, HEAD_DIM)
    key[:, :, :20] = 1e4
    mask = torch.ones(1, 64)
    mask[:, :20] = 0
    cache = new_cache("int4", attention_mask=mask)
    feed(cache, key, value)
    keys = cache.layers[0]._states(cache.layers[0]._keys)
    low, high = key[:, :, 20:].amin(2), key[:, :, 20:].amax(2)
    torch.testing.assert_close(keys.zero_point[:, :, 0].float(), low, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(keys.scale[:, :, 0].float(), (high - low) / 15, rtol=2e-3, atol=2e-3)


def test_sinks_are_the_first_tokens_of_each_row():
    mask = torch.ones(3, 12)
    mask[1, :5] = 0
    mask[2, :11] = 0
    cache = new_cache("int4", attention_mask=mask)
    key, value = states(14, batch=3)
    feed(cache, key, value, [12, 1, 1])
    assert cache.layers[0].sink_positions.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [11, 12, 13, -1]]
    sink = cache.layers[0]._keys.sink
    assert torch.equal(sink[1, :, 0], key[1, :, 5])
    assert torch.equal(sink[2, :, 2], key[2, :, 13])


def test_stored_columns_keep_their_padding():
    """A later mask concerns later columns only, even if the first mask was shorter than the stored tokens."""
    mask = torch.ones(2, 10)
    mask[0, :4] = 0
    cache, fresh = new_cache("int4", attention_mask=mask), new_cache("int4", attention_mask=mask)
    key, value = states(80)
    feed(cache, key[:, :, :30], value[:, :, :30], [10, 20])
    feed(fresh, key[:, :, :30], value[:, :, :30], [10, 20])
    later = torch.ones(2, 50)
    later[:, :30] = 0
    later[1, 30:40] = 0
    cache.set_padding(later)
    expected = torch.zeros(2, 50, dtype=torch.bool)
    expected[0, :4] = True
    expected[1, 30:40] = True
    assert torch.equal(cache.layers[0].padding, expected)
    feed(cache, key[:, :, 30:], value[:, :, 30:])
    fresh.layers[0].padding = expected
    feed(fresh, key[:, :, 30:], value[:, :, 30:])
    assert_same(cache, fresh)
    cache.set_padding(torch.zeros(2, 60))
    assert torch.equal(cache.layers[0].padding[:, :50], expected)
    assert not cache.layers[0].padding[:, 50:].any()


def test_padding_of_another_batch_raises():
    cache = new_cache("int4", attention_mask=torch.ones(3, 10).triu())
    with pytest.raises(ValueError, match=r"attention_mask: batch 3 .* batch 2"):
        feed(cache, *states(10))
    cache = new_cache("int4")
    feed(cache, *states(10))
    with pytest.raises(ValueError, match=r"attention_mask: batch 3 .* 2"):
        cache.set_padding(torch.ones(3, 10))
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 1, 1, 10\)"):
        cache.set_padding(torch.ones(2, 1, 1, 10))


# --- memory


def every_tensor(cache) -> int:
    """Bytes of every distinct tensor storage that is reachable from the cache."""
    seen, storages, pending = set(), {}, [cache]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif hasattr(value, "__dict__"):
            pending.extend(vars(value).values())
    return sum(storages.values())


@every_config
@pytest.mark.parametrize("max_length", [None, 150], ids=["grown", "reserved"])
def test_memory_report_is_exact(kv_config, max_length):
    mask = torch.ones(2, 100)
    mask[0, :3] = 0
    cache = new_cache(kv_config, layers=2, max_length=max_length, attention_mask=mask)
    assert cache.memory_report()["total"] == 0
    for layer_idx in (0, 1):
        feed(cache, *states(100, dtype=torch.bfloat16), layer_idx=layer_idx)
    report = cache.memory_report()
    assert report["total"] == every_tensor(cache)
    assert report["total"] == sum(report[part] for part in ("codes", "scales", "dense", "slack"))
    assert report["dense_equivalent"] == 2 * 2 * 2 * HEADS * 100 * HEAD_DIM * 2
    assert report["slack"] > 0


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "falcon_h1", "jamba"])
def test_memory_of_native_layers_is_counted(name):
    model = families.build(name, attn="eager")
    with torch.no_grad():
        out = model.generate(
            families.prompt(2), max_new_tokens=5, cache_implementation="kvquant-int4", return_dict_in_generate=True
        )
    cache = out.past_key_values
    assert any(type(layer) is not QuantizedLayer for layer in cache.layers)
    assert len(cache.quantized_layers) == families.ALL[name].num_full
    assert cache.memory_report()["total"] == every_tensor(cache)


def expected_bytes(kv_config: KVQuantConfig, tokens: int, head_dim: int) -> int:
    """Bytes per head of keys and values after `tokens` BF16 tokens (whole blocks), by the formulas of the design."""
    total = 0
    for spec in (kv_config.keys, kv_config.values):
        total += tokens * head_dim // (2 if spec.format == "int4" else 1)
        if spec.grid == "channel":
            # An FP16 scale and zero point per channel and block.
            total += tokens // spec.block_length * head_dim * 4
        else:
            total += tokens * head_dim // (spec.group_size or head_dim) * 2
        window = max(spec.block_length or 0, kv_config.recent_length)
        total += (window + 64 if window else 0) * head_dim * 2
        total += kv_config.sink_length * head_dim * 2
    return total


@pytest.mark.parametrize(
    ("name", "at_most"), [("int8-plain", 0.51), ("fp8", 0.51), ("int8", 0.54), ("int4", 0.29), ("int4-small", 0.27)]
)
def test_bytes_at_8k_tokens(name, at_most):
    """The promise of the README: BF16, head_dim 128, storage for exactly the tokens of a `generate` call."""
    tokens = 8192
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1, head_dim=128), name, max_length=tokens)
    feed(cache, *states(tokens, batch=1, dtype=torch.bfloat16, head_dim=128), [tokens - 1, 1])
    report = cache.memory_report()
    assert report["total"] == every_tensor(cache)
    assert report["total"] / report["dense_equivalent"] <= at_most
    assert report["slack"] == 0
    layer = cache.layers[0]
    small = layer.sink_positions.nbytes + layer.faults.nbytes
    assert report["total"] == HEADS * expected_bytes(KVQuantConfig.preset(name), tokens, 128) + small


_PEAK = """
import os, resource, sys, torch, transformers
import hf_kvquant
torch.set_num_threads(1)
config = transformers.LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
step = 32
x = torch.ones(1, 8, step, 128, dtype=torch.bfloat16)

def fill(name, tokens):
    if name == "dense":
        cache = transformers.DynamicCache(config=config)
        for layer_idx in range(4):
            whole = x.repeat(1, 1, tokens // step, 1)
            cache.update(whole, whole, layer_idx)
        return cache
    cache = hf_kvquant.QuantizedCache(config, name, max_length=tokens)
    for layer_idx in range(4):
        for start in range(0, tokens, step):
            hf_kvquant.route.learn_route(*cache.update(x, x, layer_idx))
    return cache

for name in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        fill(name, 2 * step)  # pages of code that the first use loads are no part of a cache
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cache = fill(name, 8192)
        assert cache.get_seq_length(3) == 8192
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.any_host
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and getrusage")
def test_process_memory_falls():
    """Peak resident memory (kilobytes) of processes that fill a cache with 8k tokens, against transformers' own."""
    names = ["dense", "int8-plain", "int4-small"]
    # Not in the repository's folder, where Python would import the source instead of the installed package.
    command, folder = [sys.executable, "-c", _PEAK, *names], Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=processes.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = dict(zip(names, map(int, done.stdout.split())))
    dense = 4 * 2 * 8 * 8192 * 128 * 2 / 1024
    assert grown["dense"] >= 0.95 * dense
    assert grown["int8-plain"] <= 0.65 * dense
    assert grown["int4-small"] <= 0.40 * dense


# --- inference mode, per-layer settings, errors


@every_config
@pytest.mark.parametrize("built_inside", [True, False], ids=["inside", "outside"])
def test_inference_mode(kv_config, built_inside):
    """A cache that is filled inside inference mode goes on outside, and the other way around."""
    mask = torch.ones(2, 300)
    mask[0, :3] = 0
    cache, fresh = new_cache(kv_config), new_cache(kv_config, attention_mask=mask)
    key, value = states(300)
    feed(fresh, key, value)

    def begin():
        cache.set_padding(mask)
        feed(cache, key[:, :, :70].clone(), value[:, :, :70].clone(), [70])
        cache.reorder_cache(torch.tensor([0, 1]))

    def go_on():
        feed(cache, key[:, :, 70:].clone(), value[:, :, 70:].clone(), [30] * 7 + [20])
        cache.crop(-8)
        cache.layers[0].offload()
        cache.batch_select_indices(torch.tensor([0, 1]))
        feed(cache, key[:, :, 292:].clone(), value[:, :, 292:].clone())

    with torch.inference_mode(built_inside):
        begin()
    with torch.inference_mode(not built_inside):
        go_on()
    assert_same(cache, fresh)
    cache.crop(-64)
    feed(cache, key[:, :, 236:], value[:, :, 236:], [32, 32])
    assert_same(cache, fresh)


def test_grad_does_not_reach_the_cache():
    cache = new_cache(dataclasses.replace(KVQuantConfig.preset("int4"), backend="reference"))
    key, value = (s.requires_grad_() for s in states(70))
    returned = feed(cache, key * 1, value * 1)
    assert returned[0].requires_grad
    for tensor in stored(cache).values():
        assert not tensor.requires_grad


def test_layers_are_chosen_one_by_one():
    override = {1: LayerOverride(keys=DENSE, values=DENSE), 2: LayerOverride(values=INT4)}
    cache = new_cache(KVQuantConfig(CHANNEL4, INT8, layers=override), layers=3)
    assert type(cache.layers[1]) is DynamicLayer
    assert len(cache.quantized_layers) == 2
    for layer_idx in range(3):
        feed(cache, *states(70), layer_idx=layer_idx)
    specs = [(s._keys.spec.format, s._values.spec.format) for s in cache.quantized_layers]
    assert specs == [("int4", "int8"), ("int4", "int4")]
    assert torch.equal(cache.layers[1].keys, states(70)[0])
    assert cache.memory_report()["total"] == every_tensor(cache)


def test_a_cache_that_cannot_act_raises():
    sliding = families.config("mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"mistral: none of the 2 layers has full attention .*nothing to quantize"):
        QuantizedCache(sliding, "int4")
    with pytest.raises(
        ValueError, match=r"layers\.2: the model has no such full-attention layer; expected one of \[0, 1\]"
    ):
        new_cache(KVQuantConfig(INT8, INT8, layers={2: LayerOverride(values=INT4)}), layers=2)
    hybrid = families.config("gemma3")
    with pytest.raises(ValueError, match=r"layers\.3: .*full-attention or sliding layer; expected one of \[0, 1, 2\]"):
        QuantizedCache(hybrid, KVQuantConfig(INT8, INT8, layers={3: LayerOverride(values=INT4)}))
    fixed = KVQuantConfig(INT8, INT8, static=True, layers={3: LayerOverride(values=INT4)})
    with pytest.raises(ValueError, match=r"layers\.3: .*full-attention or sliding layer; expected one of \[0, 1, 2\]"):
        QuantizedCache(hybrid, fixed, max_length=50)
    with pytest.raises(ValueError, match=r"layer 0: keys\.head_dim: 20 .* multiple of 8"):
        feed(new_cache("int8"), *states(10, head_dim=20))
    wide_groups = KVQuantConfig(INT8, QuantSpec("int4", group_size=64))
    with pytest.raises(ValueError, match=r"layer 0: values\.group_size: 64 does not divide head_dim 96"):
        feed(new_cache(wide_groups), *states(9, head_dim=96))


def test_states_that_do_not_fit_raise():
    cache = new_cache("int8")
    feed(cache, *states(10))
    with pytest.raises(ValueError, match=r"key_states: .*bfloat16 does not fit layer 0; expected .*float32"):
        feed(cache, *states(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"key_states: \(3, 2, 1, 64\)"):
        feed(cache, *states(1, batch=3))
    assert cache.get_seq_length() == 10


def test_nonfinite_is_counted_and_said_once():
    cache = new_cache("int8-plain", layers=2)
    route._said.clear()
    key, value = states(70)
    key[0, 1, 5, 3], value[1, 0, 6, 2], value[1, 0, 6, 7] = torch.nan, torch.inf, torch.nan
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        feed(cache, key, value)
        feed(cache, key, value, layer_idx=1)
    assert ["NaN or infinity" in str(w.message) for w in said] == [True]
    assert cache.routes["nonfinite"] == 4


def test_route_is_dequantized_until_attention_says_otherwise():
    cache = new_cache("int4")
    key, value = states(71)
    route._said.clear()
    cache.update(key[:, :, :70], value[:, :, :70], 0)
    with pytest.warns(UserWarning, match="outside of hf_kvquant.attention"):
        out = cache.update(key[:, :, 70:], value[:, :, 70:], 0)
    assert all(type(s) is torch.Tensor and s.shape[2] == 71 for s in out)
    assert cache.routes["decode_dequantized"] == 1


def test_it_is_transformers_own_cache():
    cache = new_cache("int4", layers=2)
    assert isinstance(cache, DynamicCache)
    assert len(cache) == 2
    assert not cache.is_initialized
