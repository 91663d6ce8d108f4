"""Sliding layers, quantized: what is retired is never missed, bytes are bounded, and masks are transformers' own."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import families
import pytest
import torch
from captured import Recorded
from torch._dynamo.utils import counters
from transformers import DynamicCache, MistralConfig
from turns import ROUNDING, TURNS, check_crop, check_crop_of_too_much, run

import hf_kvquant
from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantizedStates, QuantSpec, attention, ops, static
from hf_kvquant.attention import attend
from hf_kvquant.host import CACHE, DynamicSlidingWindowLayer
from hf_kvquant.layers import QuantizedLayer
from hf_kvquant.scoring import score, score_by_decoding
from hf_kvquant.sliding import SlidingQuantizedLayer
from hf_kvquant.static import StaticQuantizedLayer
from hf_kvquant.static_sliding import StaticSlidingQuantizedLayer
from hf_kvquant.storage import ROLLBACK

WINDOW = 24
BLOCKS = QuantSpec("int8", "channel", block_length=16)
CONFIGS = {
    name: dataclasses.replace(KVQuantConfig.preset(name), sliding=WINDOW) for name in KVQuantConfig.preset_names()
}
CONFIGS["windows"] = KVQuantConfig(BLOCKS, QuantSpec("int8"), sink_length=3, recent_length=7, sliding=WINDOW)
CONFIGS["long-recent"] = KVQuantConfig(
    QuantSpec("int8"), QuantSpec("int8"), sink_length=2, recent_length=70, sliding=2
)
CONFIGS["value-blocks"] = KVQuantConfig(
    BLOCKS, QuantSpec("int4", "channel", block_length=32), sink_length=3, recent_length=7, sliding=WINDOW
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_family = pytest.mark.parametrize("name", families.SLIDING)


def build(name: str = "mistral_window", **options):
    return families.build(name, **families.small(name), **options)


def sliding(cache: QuantizedCache) -> list[SlidingQuantizedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SlidingQuantizedLayer)]


@every_config
# transformers' Zaya cannot run while its linear states record their past.
@pytest.mark.parametrize("name", [name for name in families.SLIDING if name != "zaya_window"])
def test_what_is_retired_is_not_missed(name, config):
    """The same logits as from a cache that keeps every token, with left padding in a batch."""
    model, ids = build(name, dtype=torch.float64), families.prompt(2, sum(TURNS))
    mask = torch.ones_like(ids)
    mask[1, :90] = 0
    cache, whole = (QuantizedCache(model.config, config, attention_mask=mask) for _ in range(2))
    whole.activate_past_recording()
    got, expected = run(model, cache, ids, mask=mask), run(model, whole, ids, mask=mask)
    assert sliding(cache)
    assert all(layer.dropped for layer in sliding(cache))
    assert not any(layer.dropped for layer in sliding(whole))
    assert cache.routes == whole.routes
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=ROUNDING)


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nearly_the_logits_of_the_dense_cache(name, attn):
    model, ids = build(name, attn=attn), families.prompt(1, sum(TURNS))
    config = KVQuantConfig(QuantSpec("int8", "channel"), QuantSpec("int8"), recent_length=8, sliding=WINDOW)
    got = run(model, QuantizedCache(model.config, config), ids)
    expected = run(model, DynamicCache(config=model.config), ids)
    assert (got - expected).pow(2).mean().sqrt() <= 0.03 * expected.std()
    # Negative control: a window that is one token wider is noticed.
    wider = build(name, attn=attn, **{"attention_chunk_size" if "chunks" in name else "sliding_window": WINDOW + 1})
    assert (run(wider, DynamicCache(config=wider.config), ids) - expected).pow(2).mean().sqrt() > 0.05 * expected.std()


@pytest.mark.parametrize("turns", [TURNS, (1,) * 60, (23, 1, 1, 40), (24, 33, 1), (25, 2), (100, 100)], ids=str)
def test_masks_and_states_have_the_columns_of_transformers_own_layer(turns):
    native, layer = DynamicSlidingWindowLayer(sliding_window=WINDOW), new_layer()
    for n in turns:
        assert layer.get_mask_sizes(n) == native.get_mask_sizes(n)
        new = torch.randn(2, 1, 2, n, 16)
        expected, got = native.update(*new), layer.update(*new)
        assert [x.shape for x in got] == [x.shape for x in expected]
        assert torch.equal(got[0][:, :, -n:], expected[0][:, :, -n:]) or n <= ops.MAX_Q_LEN
        assert (got[0] - expected[0]).abs().max() < 0.1
        assert layer.get_seq_length() == native.get_seq_length()
        assert layer.keys.shape == native.keys.shape
    assert layer.get_max_length() == native.get_max_length()
    assert layer.is_sliding


def new_layer(config: str = "windows", **options) -> SlidingQuantizedLayer:
    model = families.config("mistral_window", num_hidden_layers=1, **options)
    return QuantizedCache(model, CONFIGS[config]).layers[0]


@every_config
def test_bytes_are_bounded(config):
    cache = QuantizedCache(families.config("mistral_window", num_hidden_layers=1), config)
    block = config.keys.block_length or 1
    most = -(-(WINDOW + ROLLBACK + max(block, ROLLBACK)) // block) * block
    cache.update(*torch.randn(2, 1, 2, 1000, 16), 0)
    total = cache.memory_report()["total"]
    for _ in range(300):
        cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
        assert cache.memory_report()["total"] == total
        assert cache.layers[0]._keys.capacity <= most
    cache.reserve(10_000)
    assert cache.memory_report()["total"] == total
    assert cache.memory_report()["dense_equivalent"] == 2 * 2 * (WINDOW - 1) * 16 * 4
    grown = QuantizedCache(families.config("mistral_window", num_hidden_layers=1), config)
    for _ in range(1300):
        grown.update(*torch.randn(2, 1, 2, 1, 16), 0)
    assert grown.memory_report()["total"] == total


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padding-mask"])
@pytest.mark.parametrize("q_len", [1, 5])
def test_attention_that_gets_no_window_in_its_mask(q_len, padded):
    """Flash attention leaves the window, and with padding the columns, to attention."""
    layer = new_layer()
    for n in (300, *[1] * 10):
        layer.update(*torch.randn(2, 2, 2, n, 16))
    layer.takes_states = True
    keys, values = layer.update(*torch.randn(2, 2, 2, q_len, 16))
    assert isinstance(keys, QuantizedStates)
    query, kv_len = torch.randn(2, 4, q_len, 16), WINDOW - 1 + q_len
    columns = torch.arange(kv_len)
    positions = columns[-q_len:, None]
    seen = (columns <= positions) & (columns > positions - WINDOW)
    padding = torch.ones(2, kv_len, dtype=torch.bool)
    if padded:
        padding[1, :20] = False
    complete = seen & padding[:, None, None]

    def forbidden(*args, **kwargs):
        raise AssertionError("dense attention was called")

    def of(mask):
        return attend(None, query, keys, values, mask, dense_attention=forbidden, sliding_window=WINDOW)[0]

    expected = of(complete)
    assert torch.equal(of(padding if padded else None), expected)
    additive = torch.zeros(complete.shape).masked_fill(~complete, torch.finfo(torch.float32).min)
    torch.testing.assert_close(of(additive), expected)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.read(q_len).repeat_interleave(2, 1) for x in (keys, values)), attn_mask=complete
    )
    torch.testing.assert_close(dense.transpose(1, 2), expected, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="mask: shape"):
        of(torch.ones(2, 1, q_len, kv_len - 1, dtype=torch.bool))


@pytest.mark.parametrize("q_len", [1, 5])
def test_a_position_bias_for_the_columns_of_the_window(q_len):
    """Inkling makes it as wide as its mask."""
    layer = new_layer()
    for n in (150, *[1] * 10):
        layer.update(*torch.randn(2, 2, 2, n, 16))
    layer.takes_states = True
    keys, values = layer.update(*torch.randn(2, 2, 2, q_len, 16))
    query, columns = torch.randn(2, 4, q_len, 16), torch.arange(WINDOW - 1 + q_len)
    positions = columns[-q_len:, None]
    seen = ((columns <= positions) & (columns > positions - WINDOW))[None, None]
    bias = torch.randn(1, 4, q_len, len(columns))

    def of(mask, **options):
        return attend(None, query, keys, values, mask, dense_attention=None, sliding_window=WINDOW, **options)[0]

    expected = of(torch.where(seen, bias, torch.finfo(torch.float32).min))
    assert torch.equal(of(seen, position_bias=bias), expected)
    assert torch.equal(of(None, position_bias=bias), expected)
    assert (of(seen) - expected).abs().max() > 0.01


def test_an_obstacle_reads_what_the_mask_has():
    """Attention weights come from dense attention over de-quantized states of the window."""
    model, ids = build("mistral_window", attn="eager"), families.prompt(1, 300)
    cache, again = (QuantizedCache(model.config, CONFIGS["int8"]) for _ in range(2))
    expected = run(model, cache, ids, (297, 1, 1, 1))
    run(model, again, ids, (297, 1))
    with torch.no_grad(), attention(model):
        out = model(ids[:, 298:299], **{CACHE: again}, output_attentions=True)
    assert out.attentions[0].shape[-1] == WINDOW
    torch.testing.assert_close(out.logits[:, 0], expected[:, 298], rtol=0, atol=10 * ROUNDING)


# --- which layers


def test_every_preset_takes_mistral_as_it_is():
    for name in KVQuantConfig.preset_names():
        cache = QuantizedCache(MistralConfig(), name)
        assert {type(layer) for layer in cache.layers} == {SlidingQuantizedLayer}
        assert cache.layers[0].sliding_window == 4096
        # Where no token leaves the window there is none.
        assert {type(layer) for layer in QuantizedCache(MistralConfig(), name, max_length=4096).layers} == {
            QuantizedLayer
        }


def test_the_config_says_which_windows():
    model = families.config("gemma3_window")

    def kinds(**options) -> list[type]:
        config = dataclasses.replace(KVQuantConfig.preset("int8"), **options)
        return [type(layer) for layer in QuantizedCache(model, config).layers]

    own = [DynamicSlidingWindowLayer, QuantizedLayer, DynamicSlidingWindowLayer]
    assert kinds() == kinds(sliding="dense") == kinds(sliding=WINDOW + 1) == own
    assert kinds(sliding=WINDOW) == [SlidingQuantizedLayer, QuantizedLayer, SlidingQuantizedLayer]
    int4 = {2: LayerOverride(QuantSpec("int4"))}
    assert kinds(sliding="dense", layers=int4) == [DynamicSlidingWindowLayer, QuantizedLayer, SlidingQuantizedLayer]
    dense = {0: LayerOverride(QuantSpec("dense"), QuantSpec("dense"))}
    assert kinds(sliding=WINDOW, layers=dense) == [DynamicSlidingWindowLayer, QuantizedLayer, SlidingQuantizedLayer]
    fixed = dataclasses.replace(KVQuantConfig.preset("int8-static"), sliding=WINDOW)
    ours = [StaticSlidingQuantizedLayer, StaticQuantizedLayer, StaticSlidingQuantizedLayer]
    assert [type(layer) for layer in QuantizedCache(model, fixed, max_length=100).layers] == ours
    assert {type(layer) for layer in QuantizedCache(model, fixed, max_length=WINDOW).layers} == {StaticQuantizedLayer}


@pytest.mark.parametrize("value", [1, 0, -5, True, 3.5, None, "int8", [512]])
def test_other_values_of_sliding_are_refused(value):
    with pytest.raises(ValueError, match=r"sliding: .* is not allowed; expected an integer from 2 on .* or 'dense'"):
        dataclasses.replace(KVQuantConfig.preset("int8"), sliding=value)


def test_nothing_to_quantize():
    model = families.config("mistral_window")
    for options, told in (({}, "512"), ({"sliding": "dense"}, "dense")):
        with pytest.raises(ValueError, match=rf"or a window that `sliding: {told}` takes .*nothing to quantize"):
            QuantizedCache(model, dataclasses.replace(KVQuantConfig.preset("int8"), **options))
    with pytest.raises(ValueError, match=r"layers\.9: the model has no such full-attention or sliding layer"):
        QuantizedCache(model, dataclasses.replace(CONFIGS["int8"], layers={9: LayerOverride(QuantSpec("int4"))}))


@pytest.mark.parametrize("layers", [{0: LayerOverride(QuantSpec("dense"), QuantSpec("dense"))},
                                    {2: LayerOverride(QuantSpec("int8", "channel", block_length=256))}],
                         ids=["dense", "other-blocks"])  # fmt: skip
def test_layers_that_differ_share_a_mask(layers):
    """The model makes one mask for all sliding layers, whoever stores them and in whatever blocks."""
    model, ids = build("gemma3_window"), families.prompt(1, sum(TURNS))
    config = dataclasses.replace(CONFIGS["int8"], layers=layers)
    got = run(model, QuantizedCache(model.config, config), ids)
    expected = run(model, DynamicCache(config=model.config), ids)
    assert (got - expected).pow(2).mean().sqrt() <= 0.03 * expected.std()


# --- scoring


@pytest.mark.parametrize("name", ["mistral_window", "gemma3_window", "llama4_chunks"])
@pytest.mark.parametrize("config", ["int8", "int4", "windows", "long-recent"])
def test_scored_as_decoded(name, config):
    """Layers with linear states besides cannot be scored in one pass."""
    model, ids = build(name, dtype=torch.float64), families.prompt(2, 330)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    # Token by token takes longest.
    steps = 1 if config == "windows" else 5
    for context, chunk in ((10, steps), (200, 7)):
        expected = score_by_decoding(model, ids, context, CONFIGS[config], mask, chunk=chunk)
        for length in (256, 512):
            got = score(model, ids, context, CONFIGS[config], mask, chunk_length=length)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


# --- going back


@every_config
@pytest.mark.parametrize("removed", [1, 40, 64])
def test_a_crop_across_the_window(config, removed):
    check_crop(build(dtype=torch.float64), config, families.prompt(1, 500), removed)


def test_a_crop_that_needs_what_is_retired_changes_nothing():
    check_crop_of_too_much(build("gemma3_window"), CONFIGS["int8"], families.prompt(1, 500), layers=3)


def test_a_recorded_past_goes_back_as_far_as_the_last_crop():
    model, ids = build(), families.prompt(1, 700)
    cache, fresh = (QuantizedCache(model.config, CONFIGS["int8-plain"]) for _ in range(2))
    for each in (cache, fresh):
        run(model, each, ids, (300,))
    cache.activate_past_recording()
    run(model, cache, ids, (32,) * 8)
    cache.crop(-250)
    assert cache.layers[0]._keys.capacity <= WINDOW + 2 * ROLLBACK
    run(model, fresh, ids, (6,))
    got, expected = (run(model, each, ids, [1] * 20) for each in (cache, fresh))
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("n", [1, 64, 120, 500])
@pytest.mark.parametrize("length", [0, 100, 300])
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_while_a_layer_stores(call, written, length, n, monkeypatch):
    """Up to 64 tokens are forgotten, and so is the first prompt; more may have taken with them what is needed."""
    tokens, real, calls = torch.randn(2, 1, 2, length + n + 50, 16), ops.quantize_append, []
    config = families.config("mistral_window", num_hidden_layers=1)
    cache, fresh = QuantizedCache(config, CONFIGS["int4"]), QuantizedCache(config, CONFIGS["int4"])
    if length:
        for each in (cache, fresh):
            each.update(*tokens[:, :, :, :length], 0)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) < call:
            return real(*args, **kwargs)
        if written:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "quantize_append", interrupted)
        try:
            cache.update(*tokens[:, :, :, length : length + n], 0)
        except KeyboardInterrupt:
            pass
        else:
            pytest.skip("the update has one piece")
    with pytest.raises(ValueError, match="interrupted"):
        cache.update(*tokens[:, :, :, -1:], 0)
    if length and n > ROLLBACK:
        with pytest.raises(ValueError, match=r"stored more than 64 tokens.*cache\.reset\(\)"):
            cache.crop(0)
        return
    cache.crop(0)
    assert cache.get_seq_length() == length
    new = tokens[:, :, :, -40:]
    for each in (cache, fresh):
        each.update(*new, 0)
    for a, b in zip(cache.layers[0]._views(), fresh.layers[0]._views()):
        assert torch.equal(a.read(1), b.read(1))


def test_no_memory_to_move_columns(monkeypatch):
    cache = QuantizedCache(families.config("mistral_window", num_hidden_layers=1), CONFIGS["int4"])
    cache.update(*torch.randn(2, 1, 2, 150, 16), 0)
    layer = cache.layers[0]
    layer.takes_states = True
    for _ in range(42):
        cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
    assert layer.length == layer._most
    before, values = copy.deepcopy(cache), layer._values

    def refuse(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(values, "moved", refuse)
        with pytest.raises(MemoryError):
            cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 192
    new = torch.randn(2, 1, 2, 1, 16)
    for a, b in zip(cache.update(*new, 0), before.update(*new, 0)):
        assert torch.equal(a.read(1), b.read(1))
    assert layer.dropped


# --- rows, generation, files


def test_rows_are_chosen_after_columns_were_retired():
    model, ids = build("gemma3_window"), families.prompt(3, 400)
    mask = torch.ones_like(ids)
    mask[1, :290] = 0
    cache = QuantizedCache(model.config, CONFIGS["windows"], attention_mask=mask)
    run(model, cache, ids, (280, *[1] * 5), mask)
    rows = torch.tensor([1, 1, 0])
    expected = run(model, copy.deepcopy(cache), ids, [1] * 100, mask)
    cache.reorder_cache(rows)
    got = run(model, cache, ids[rows], [1] * 100, mask[rows])
    # The first tokens of row 1 come only now: they are its sinks, though columns before them are retired.
    seen = mask[rows, 285:385].bool()
    torch.testing.assert_close(got[seen], expected[rows][seen], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_generate_beyond_the_window_of_some_layers(static):
    """Layers then store different numbers of columns, of the same tokens."""
    model, ids = build("gemma3_window"), families.prompt(1, 300)
    config = dataclasses.replace(CONFIGS["int8"], static=static)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    out = model.generate(ids, **options, cache_implementation="kvquant", cache_config=config)
    assert out.sequences.shape == (1, 320)
    lengths = [layer.length for layer in out[CACHE].layers]
    assert lengths[0] == lengths[2] < lengths[1] == 319


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_assisted_decoding_beyond_the_window(preset):
    # The assistant's own cache is dense. With a window it fails before transformers 5.19, whatever the target's is.
    model, assistant = build(), build(seed=1, sliding_window=None)
    ids, options = families.prompt(1, 250), {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    choice = {"cache_implementation": "kvquant", "cache_config": CONFIGS[preset]}
    plain = model.generate(ids, **options, **choice)
    assisted = model.generate(ids, **options, **choice, assistant_model=assistant)
    assert torch.equal(plain.sequences, assisted.sequences)
    cache = assisted[CACHE]
    assert {type(layer) for layer in cache.layers} == {SlidingQuantizedLayer}
    assert cache.layers[0].dropped or cache.layers[0].record_past


@every_config
def test_save_and_load(config, tmp_path):
    model, ids = build("gemma3_window"), families.prompt(2, 500)
    cache = QuantizedCache(model.config, config)
    run(model, cache, ids, (300, *[1] * 3))
    path = tmp_path / "cache.safetensors"
    cache.save(path, model)
    loaded = QuantizedCache.load(path, model)
    assert [layer.dropped for layer in sliding(loaded)] == [layer.dropped for layer in sliding(cache)] != [0, 0]
    assert torch.equal(run(model, loaded, ids, (*[1] * 100, 40)), run(model, cache, ids, (*[1] * 100, 40)))


def test_files_from_before_quantized_sliding_layers(tmp_path):
    """They say nothing about sliding layers, which were not quantized."""
    model, ids = build("gemma3_window"), families.prompt(1, 200)
    config = dataclasses.replace(CONFIGS["int8"], sliding="dense")
    cache = QuantizedCache(model.config, config)
    run(model, cache, ids, (100,))
    path = tmp_path / "cache.safetensors"
    without = {name: value for name, value in config.to_dict().items() if name != "sliding"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVQuantConfig, "to_dict", lambda self: without)
        cache.save(path, model)
    loaded = QuantizedCache.load(path, model)
    assert torch.equal(run(model, loaded, ids, [1] * 30), run(model, cache, ids, [1] * 30))


# --- static caches


def fixed(model, config: KVQuantConfig, max_length: int = 1000, **options) -> QuantizedCache:
    config = dataclasses.replace(config, static=True)
    return QuantizedCache(getattr(model, "config", model), config, max_length=max_length, **options)


def append(cache: QuantizedCache, new: torch.Tensor, traced: bool) -> list[torch.Tensor]:
    """Store keys and values `[2, batch, heads, n, head_dim]` as a compiled step does, or a plain one."""
    with mock.patch.object(static, "is_traced", return_value=traced):
        return cache.update(*new, 0)


def assert_same(a: QuantizedCache, b: QuantizedCache) -> None:
    """Equal bytes, and equal reads of the next query."""
    for left, right in zip(a.layers, b.layers):
        assert left.tokens == right.tokens
        states = [layer.state() for layer in (left, right)]
        assert states[0]["dropped"] == states[1]["dropped"]
        assert torch.equal(states[0]["sink_positions"], states[1]["sink_positions"])
        for side in ("keys", "values"):
            one, two = (state[side] for state in states)
            for name, value in one.items():
                equal = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
                assert equal, (side, name)
            assert torch.equal(getattr(left, side), getattr(right, side))


@every_config
@every_family
def test_a_static_cache_equals_the_growing_one_to_the_bit(name, config):
    model, ids = build(name), families.prompt(2, sum(TURNS))
    mask = torch.ones_like(ids)
    mask[1, :90] = 0
    grown = QuantizedCache(model.config, config, attention_mask=mask)
    same = fixed(model, config, attention_mask=mask)
    expected, got = (run(model, cache, ids, mask=mask) for cache in (grown, same))
    assert torch.equal(got[mask.bool()], expected[mask.bool()])
    assert same.routes == grown.routes
    assert [layer.dropped for layer in sliding(same)] == [layer.dropped for layer in sliding(grown)]
    assert all(layer.dropped for layer in sliding(same))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "de-quantized"])
@pytest.mark.parametrize("config", ["int4", "windows"])
@pytest.mark.parametrize("name", ["mistral_window", "gemma3_window", "llama4_chunks"])
@pytest.mark.filterwarnings("ignore:.*lru_cache", "ignore:.*de-quantized")
def test_compiled_steps_cross_the_window_in_one_graph(name, config, fused):
    """One for steps, one for short and one for long turns; full storage needs no other."""
    model, ids, turns = build(name, dtype=torch.float64), families.prompt(2, 500), (5, *[1] * 60, 40, *[1] * 20)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    grown, same = QuantizedCache(model.config, CONFIGS[config]), fixed(model, CONFIGS[config], 400)
    logits = []
    for cache, call in ((grown, model), (same, forward)):
        if not fused:
            cache.disable_fused("a test compares both routes")
        run(model, cache, ids, (100, 1))
        with torch.no_grad(), attention(model):
            start, found = 101, []
            for n in (*[1] * 70, *turns):
                found.append(call(ids[:, start : start + n], **{CACHE: cache}).logits)
                start += n
        logits.append(torch.cat(found, 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=ROUNDING)
    assert counters["stats"]["unique_graphs"] == 3
    assert same.routes == grown.routes
    assert int(same.get_seq_length()) == grown.get_seq_length() == start
    assert [layer.dropped for layer in sliding(same)] == [layer.dropped for layer in sliding(grown)]
    assert all(layer.dropped for layer in sliding(same))
    torch._dynamo.reset()


def test_static_bytes_are_bounded_by_the_window():
    model = families.config("mistral_window", num_hidden_layers=1)
    reports = []
    for max_length in (200, 100_000):
        cache = fixed(model, CONFIGS["int4"], max_length)
        cache.update(*torch.randn(2, 1, 2, 150, 16), 0)
        reports.append(cache.memory_report())
        assert cache.get_max_length() == max_length
    # The padding of all tokens is kept, a byte each.
    assert reports[1]["total"] - reports[0]["total"] == 100_000 - 200
    grown = QuantizedCache(model, CONFIGS["int4"])
    grown.update(*torch.randn(2, 1, 2, 300, 16), 0)
    assert reports[0]["codes"] + reports[0]["scales"] + reports[0]["slack"] == sum(
        grown.memory_report()[part] for part in ("codes", "scales", "slack")
    )


@pytest.mark.parametrize("config", ["int4", "int8-plain", "windows", "long-recent"])
@pytest.mark.parametrize("n", [1, 30, 100, 400])
def test_what_compiled_steps_stored_can_be_cropped(config, n):
    model = families.config("mistral_window", num_hidden_layers=1)
    grown, same = QuantizedCache(model, CONFIGS[config]), fixed(model, CONFIGS[config], 2000)
    for cache in (grown, same):
        torch.manual_seed(1)
        append(cache, torch.randn(2, 2, 2, 150, 16), traced=False)
        for _ in range(-(-130 // n)):
            append(cache, torch.randn(2, 2, 2, n, 16), traced=True)
        cache.crop(-ROLLBACK)
        append(cache, torch.randn(2, 2, 2, n, 16), traced=True)
        cache.crop(-1)
    assert_same(grown, same)
    assert same.routes["window_lost"] == 0
    with pytest.raises(RuntimeError, match=r"crop: 200 tokens cannot be removed from layer 0, whose window of 24"):
        same.crop(-200)


def test_static_rows_and_files(tmp_path):
    model, ids = build("gemma3_window"), families.prompt(3, 400)
    mask = torch.ones_like(ids)
    mask[1, :290] = 0
    cache = fixed(model, CONFIGS["windows"], attention_mask=mask)
    run(model, cache, ids, (280, *[1] * 5), mask)
    layer = sliding(cache)[0]
    places = [tensor.data_ptr() for tensor in layer._tensors()]
    rows = torch.tensor([1, 1, 0])
    expected = run(model, copy.deepcopy(cache), ids, [1] * 100, mask)
    path = tmp_path / "cache.safetensors"
    cache.save(path, model)
    cache.reorder_cache(rows)
    got = run(model, cache, ids[rows], [1] * 100, mask[rows])
    seen = mask[rows, 285:385].bool()
    torch.testing.assert_close(got[seen], expected[rows][seen], rtol=0, atol=ROUNDING)
    assert [tensor.data_ptr() for tensor in layer._tensors()] == places
    for max_length in (400, 1000):
        loaded = QuantizedCache.load(path, model, max_length=max_length)
        assert torch.equal(run(model, loaded, ids, [1] * 100, mask), expected)
    with pytest.raises(ValueError, match="max_length: 284 tokens have no room for 285"):
        QuantizedCache.load(path, model, max_length=284)


@pytest.mark.parametrize("layers", [{0: LayerOverride(QuantSpec("dense"), QuantSpec("dense"))},
                                    {2: LayerOverride(QuantSpec("int8", "channel", block_length=256))}],
                         ids=["dense", "other-blocks"])  # fmt: skip
def test_static_layers_that_differ_share_a_mask(layers):
    model, ids = build("gemma3_window"), families.prompt(1, sum(TURNS))
    config = dataclasses.replace(CONFIGS["int8"], layers=layers)
    same = fixed(model, config)
    assert all(isinstance(same.layers[i], StaticSlidingQuantizedLayer) for i in (0, 2))
    torch.testing.assert_close(
        run(model, same, ids), run(model, QuantizedCache(model.config, config), ids), rtol=0, atol=ROUNDING
    )
    same.reset()
    assert same.layers[0].max_length == 1000


@pytest.mark.parametrize("max_length", [100, 192, 200, 300])
def test_a_compiled_step_without_room_says_so_later(max_length):
    model = families.config("mistral_window", num_hidden_layers=1)
    cache = fixed(model, CONFIGS["int8"], max_length)
    append(cache, torch.randn(2, 1, 2, max_length - 10, 16), traced=False)
    for _ in range(13):
        append(cache, torch.randn(2, 1, 2, 1, 16), traced=True)
    with pytest.raises(ValueError, match=f"max_length: {max_length} tokens have no room for 3 that compiled steps"):
        cache.crop(-1)
    cache.reset()
    append(cache, torch.randn(2, 1, 2, max_length, 16), traced=False)
    with pytest.raises(ValueError, match=f"max_length: {max_length} tokens have no room for {max_length + 1}"):
        append(cache, torch.randn(2, 1, 2, 1, 16), traced=False)


def test_static_columns_that_were_interrupted_while_they_moved_are_lost(monkeypatch):
    cache = fixed(families.config("mistral_window", num_hidden_layers=1), CONFIGS["int8"])
    append(cache, torch.randn(2, 1, 2, cache.layers[0]._most, 16), traced=False)
    real = ops.retire

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "retire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(cache, torch.randn(2, 1, 2, 1, 16), traced=False)
    with pytest.raises(ValueError, match=r"cache\.reset\(\) empties the cache"):
        cache.crop(0)
    cache.reset()
    append(cache, torch.randn(2, 1, 2, 200, 16), traced=False)
    append(cache, torch.randn(2, 1, 2, 1, 16), traced=False)
    assert cache.get_seq_length() == 201


@pytest.mark.parametrize("config", ["int4", "windows"])
def test_a_captured_step_asks_nothing_of_the_device(config, monkeypatch):
    model, ids = build("gemma3_window"), families.prompt(1, 300)
    cache = fixed(model, CONFIGS[config], 300)
    run(model, cache, ids, (100, 1))
    with torch.no_grad(), attention(model), monkeypatch.context() as patch, Recorded():
        patch.setattr(static, "is_captured", lambda: True)
        for i in range(101, 200):
            model(ids[:, i : i + 1], **{CACHE: cache})
    assert cache.get_seq_length() == 200
    assert all(layer.dropped for layer in sliding(cache))
    assert cache.routes["decode_dequantized"] == 0


@pytest.mark.filterwarnings("ignore:While compiling")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_step_moves_columns(strict):
    hf_kvquant.register_for_export()
    model, ids = build("gemma3_window"), families.prompt(1, 170)
    caches = [fixed(model, CONFIGS["windows"], 300) for _ in range(2)]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, cache):
            return self.model(ids, **{CACHE: cache}).logits

    for cache in caches:
        run(model, cache, ids, (157, 1))
    with torch.no_grad(), attention(model):
        program = torch.export.export(Step(), (ids[:, 158:159], caches[0]), strict=strict)
        for i in range(158, 164):
            logits = program.module()(ids[:, i : i + 1], caches[0])
            expected = model(ids[:, i : i + 1], **{CACHE: caches[1]}).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
    assert [layer.dropped for layer in sliding(caches[0])] == [64, 64]
    assert caches[0].routes == caches[1].routes


def test_a_static_cache_is_scored_as_the_growing_one():
    model, ids = build("gemma3_window", dtype=torch.float64), families.prompt(1, 200)
    expected = score(model, ids, 50, CONFIGS["windows"])
    got = score(model, ids, 50, dataclasses.replace(CONFIGS["windows"], static=True))
    assert torch.equal(got, expected)
    dense = score(model, ids, 50, dataclasses.replace(CONFIGS["windows"], sliding="dense"))
    assert not torch.equal(got, dense)


def test_retired_columns_are_those_that_the_growing_layer_drops():
    """On a GPU the operator moves columns in every step, by none if there is room; nothing may change then."""
    cache = fixed(families.config("mistral_window", num_hidden_layers=1), CONFIGS["windows"])
    append(cache, torch.randn(2, 1, 2, 140, 16), traced=False)
    before = copy.deepcopy(cache)
    cache.layers[0]._make_space(1)
    assert_same(cache, before)
    keys = cache.layers[0]._keys.stored
    assert keys.data.shape[2] == -(-(WINDOW + 2 * ROLLBACK) // 16) * 16
    cache.layers[0]._make_space(keys.data.shape[2] - 140 + 1)
    assert (int(cache.layers[0].device_length), int(cache.layers[0].device_dropped)) == (140 - 64, 64)
