"""Eviction: queries read the sinks and the last `window_length` tokens, bytes are bounded, nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import random

import families
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig
from turns import ROUNDING, TURNS, check_crop, check_crop_of_too_much, run

from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantSpec, attention, host, ops
from hf_kvquant.attention import attend
from hf_kvquant.evicting import EvictingQuantizedLayer
from hf_kvquant.host import CACHE
from hf_kvquant.scoring import score, score_by_decoding
from hf_kvquant.storage import ROLLBACK

WINDOW = 24
BLOCKS, DENSE = QuantSpec("int8", "channel", block_length=16), QuantSpec("dense")
CONFIGS = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()} | {
    "windows": KVQuantConfig(BLOCKS, QuantSpec("int8"), sink_length=3, recent_length=7),
    "long-recent": KVQuantConfig(QuantSpec("int8"), QuantSpec("int8"), sink_length=2, recent_length=70),
    "many-sinks": KVQuantConfig(
        BLOCKS, QuantSpec("int4", "channel", block_length=32), sink_length=40, recent_length=7
    ),
    "dense-keys": KVQuantConfig(DENSE, QuantSpec("int4"), sink_length=4),
    "dense": KVQuantConfig(DENSE, DENSE, sink_length=4),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
FAMILIES = ["llama", "gemma3_window", "gpt2", "gpt_oss", "falcon_h1", "deepseek_v3"]


def windowed(config: KVQuantConfig | str, window: int = WINDOW) -> KVQuantConfig:
    return dataclasses.replace(CONFIGS[config] if isinstance(config, str) else config, window_length=window)


def build(name: str = "llama", **options):
    if name in ("deepseek_v3", "gpt_oss"):
        # The other implementation has no float64.
        options["experts_implementation"] = "eager"
    options.setdefault("attn", "eager" if name == "gpt_oss" else "sdpa")
    return families.build(name, **families.small(name), **options)


def rule(config: KVQuantConfig, batch: int):
    """Which tokens a query sees, as the documentation says it: the sinks and the last `window_length` tokens; from a
    prompt or a turn of more than 32 tokens all of it, and what its first query sees."""

    def seen(start: int, n: int, mask: torch.Tensor | None) -> torch.Tensor:
        columns = torch.arange(start + n)
        tokens = torch.ones(batch, start + n, dtype=torch.bool) if mask is None else mask[:, : start + n].bool()
        sinks = tokens & (tokens.cumsum(1) <= config.sink_length)
        queries = torch.arange(start, start + n)[:, None]
        first = torch.full_like(queries, start) if start == 0 or n > ops.MAX_Q_LEN else queries
        in_window = columns > first - config.window_length
        return ((in_window | sinks[:, None]) & (columns <= queries) & tokens[:, None])[:, None]

    return seen


def evicting(cache: QuantizedCache) -> list[EvictingQuantizedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, EvictingQuantizedLayer)]


def padding(batch: int, length: int) -> torch.Tensor:
    """A mask that pads the second row for longer than a window, and all rows a little."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :90] = 0
    mask[0, :2] = 0
    return mask


# --- what queries read


@every_config
@pytest.mark.parametrize("turns", [TURNS, (10, *[1] * 170, 40, 90, 1)], ids=["long-prompt", "short-prompt"])
def test_queries_see_the_sinks_and_the_window(config, turns):
    """The logits of a cache that keeps every token, whose masks hide those that are evicted here."""
    model, ids, config = build(dtype=torch.float64), families.prompt(2, sum(turns)), windowed(config)
    mask = padding(2, sum(turns)) if turns == TURNS else None
    cache = QuantizedCache(model.config, config, attention_mask=mask)
    whole = QuantizedCache(model.config, dataclasses.replace(config, window_length="all"), attention_mask=mask)
    got, expected = run(model, cache, ids, turns, mask), run(model, whole, ids, turns, mask, rule(config, 2))
    assert all(layer.dropped for layer in evicting(cache))
    assert len(evicting(cache)) == 2
    if config.values != DENSE:
        assert cache.routes == whole.routes
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=ROUNDING)
    # Negative control: a window that is one token wider is noticed, after the sinks of every config.
    wider, few = QuantizedCache(model.config, windowed(config, WINDOW + 1), attention_mask=mask), turns[:80]
    other, real = run(model, wider, ids, few, mask), real[:, : sum(few)]
    assert (other[real] - expected[:, : sum(few)][real]).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """With learned positions, sliding layers and linear states beside, latents, and learned sinks."""
    model, ids = build(name, dtype=torch.float64), families.prompt(1, 300)
    turns, config = (150, *[1] * 70, 7, 40, 33), windowed("windows")
    cache = QuantizedCache(model.config, config)
    whole = QuantizedCache(model.config, dataclasses.replace(config, window_length="all"))
    got = run(model, cache, ids, turns)
    assert len(evicting(cache)) == (1 if name == "gemma3_window" else 2)
    assert all(layer.dropped for layer in evicting(cache))
    if name in ("llama", "gpt2", "deepseek_v3"):
        expected = run(model, whole, ids, turns, seen=rule(config, 1))
        torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    else:
        # These make masks of several kinds, or none, and take no complete one.
        expected = run(model, whole, ids, turns)
        assert torch.equal(got[:, :150], expected[:, :150])
        assert (got - expected).abs().max() > 10 * ROUNDING
    assert cache.routes == whole.routes


@every_config
@pytest.mark.parametrize(("backend", "q_len"), [("cpu", 1), ("cpu", 5), ("cpu", 32), ("reference", 5)])
def test_the_operator_gives_float64_attention_over_what_is_kept(backend, q_len, config):
    """Computed here from all tokens, as a cache without a window has them."""
    torch.manual_seed(0)
    model, mask = families.config("llama", num_hidden_layers=1), padding(2, 400)
    config = dataclasses.replace(windowed(config), backend=backend)
    cache = QuantizedCache(model, config, attention_mask=mask)
    # Not "all", with which a layer that is dense on both sides would be transformers' own.
    whole = QuantizedCache(model, dataclasses.replace(config, window_length=10_000), attention_mask=mask)
    for n in (270, *[1] * 37, q_len):
        new = torch.randn(2, 2, 2, n, 64)
        for each in (cache, whole):
            each.enable_fused()
            keys, values = each.update(*new, 0)
            if each is cache:
                kept = keys, values
    query, kv_len = torch.randn(2, 4, q_len, 64), 307 + q_len

    def forbidden(*args, **kwargs):
        raise AssertionError("dense attention was called")

    got, _ = attend(None, query, *kept, mask[:, :kv_len], dense_attention=forbidden)
    seen = rule(config, 2)(kv_len - q_len, q_len, mask)
    assert keys.length == kv_len > kept[0].length
    for j in range(q_len):
        k, v = (x.dequantize(kv_len - q_len + j).double().repeat_interleave(2, 1) for x in (keys, values))
        hidden = ~seen[:, :, j]
        scores = (k @ query[:, :, j, :, None].double())[..., 0] / 8
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = (weights[:, :, None] @ v.masked_fill(hidden[..., None], 0))[:, :, 0]
        torch.testing.assert_close(got[:, j].double(), expected, rtol=0, atol=2e-5)


# The cache whose layers are all dense has transformers' own layers without a window.
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "dense"])
def test_a_window_longer_than_the_sequence_changes_nothing(config):
    config = CONFIGS[config]
    model, ids = build(), families.prompt(2, sum(TURNS))
    mask = padding(2, sum(TURNS))
    config = dataclasses.replace(config, layers={1: LayerOverride(QuantSpec("int8"), QuantSpec("int8"))})
    plain = QuantizedCache(model.config, config, attention_mask=mask)
    cache = QuantizedCache(model.config, windowed(config, sum(TURNS)), attention_mask=mask)
    assert torch.equal(run(model, cache, ids, mask=mask), run(model, plain, ids, mask=mask))
    assert cache.routes == plain.routes
    assert cache.memory_report() == plain.memory_report()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_dense_attention_gets_a_mask_of_what_is_kept(attn):
    """Attention weights come from de-quantized states, and so do the past's states in a long turn."""
    model, ids, config = build(attn=attn), families.prompt(2, 300), windowed("int8")
    mask = padding(2, 300)
    cache, again = (QuantizedCache(model.config, config, attention_mask=mask) for _ in range(2))
    expected = run(model, cache, ids, (200, 1, 1, 40), mask)
    run(model, again, ids, (200, 1), mask)
    given = {"attention_mask": mask[:, :202], "position_ids": (mask.cumsum(-1) - 1)[:, 201:202]}
    if attn == "eager":
        with torch.no_grad(), attention(model):
            out = model(ids[:, 201:202], **given, **{CACHE: again}, output_attentions=True)
        assert out.attentions[0].shape[-1] == again.layers[0].length < 202
        assert ((out.attentions[0] > 0).sum(-1) == WINDOW).all()
        torch.testing.assert_close(out.logits[:, 0], expected[:, 201], rtol=0, atol=10 * ROUNDING)
    else:
        assert cache.routes["decode_fused"] == 4
        assert cache.routes["decode_dequantized"] == 2


# --- bytes


@every_config
def test_bytes_are_bounded(config):
    config = windowed(config)
    model = families.config("llama", num_hidden_layers=1)
    cache, grown = (QuantizedCache(model, config) for _ in range(2))
    cache.enable_fused()
    grown.enable_fused()
    cache.update(*torch.randn(2, 1, 2, 1000, 16), 0)
    total = cache.memory_report()["total"]
    block = max(spec.block_length or 1 for spec in (config.keys, config.values))
    front = -(-config.sink_length // block) * block
    most = front + -(-(WINDOW + ROLLBACK + max(block, ROLLBACK)) // block) * block
    for _ in range(300):
        cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
        assert cache.memory_report()["total"] == total
        assert cache.layers[0]._keys.capacity <= most
    cache.reserve(10_000)
    assert cache.memory_report()["total"] == total
    # What the dense cache would hold.
    assert cache.memory_report()["dense_equivalent"] == 2 * 2 * 1300 * 16 * 4
    for _ in range(1300):
        grown.update(*torch.randn(2, 1, 2, 1, 16), 0)
    assert grown.memory_report()["total"] == total


def test_layers_choose_their_windows():
    model, ids = build(), families.prompt(1, 300)
    config = dataclasses.replace(windowed("int8-plain"), layers={1: LayerOverride(window_length="all")})
    cache = QuantizedCache(model.config, config)
    run(model, cache, ids, (200, *[1] * 50))
    first, second = cache.layers
    assert (type(first), first.tokens, first.dropped > 0) == (EvictingQuantizedLayer, 250, True)
    assert (second.tokens, second.length) == (250, 250)
    assert cache.get_seq_length() == 250
    narrow = {"window_length": 8, "values": {"format": "int8"}}
    config = KVQuantConfig.from_dict(CONFIGS["int4"].to_dict() | {"layers": {1: narrow}})
    assert [config.window(i) for i in range(2)] == [None, 8]
    assert KVQuantConfig.from_dict(config.to_dict()) == config
    cache = QuantizedCache(model.config, config)
    run(model, cache, ids, (200, *[1] * 50))
    assert [type(layer) is EvictingQuantizedLayer for layer in cache.layers] == [False, True]


# --- generate


def test_generate_with_left_padding():
    """The row of a batch that is padded generates what it does alone."""
    model, ids = build(), families.prompt(2, 200)
    ids[1] = torch.cat([torch.zeros(60, dtype=torch.long), ids[1, 60:]])
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    choice = {"cache_implementation": "kvquant", "cache_config": windowed("int8-plain").to_dict() | {"sink_length": 4}}
    out = model.generate(ids, attention_mask=mask, **options, **choice)
    alone = model.generate(ids[1:, 60:], **options, **choice)
    assert torch.equal(out.sequences[1, 200:], alone.sequences[0, 140:])
    cache = out[CACHE]
    assert cache.routes["decode_fused"] == 2 * 59
    assert cache.routes["decode_dequantized"] == 0
    assert all(layer.dropped for layer in evicting(cache))
    plain = model.generate(ids, attention_mask=mask, **options, cache_implementation="kvquant-int8-plain")
    assert not torch.equal(plain.sequences, out.sequences)


def test_beams_and_rows():
    model, ids, config = build(), families.prompt(3, 400), windowed("windows")
    mask = torch.ones_like(ids)
    mask[1, :290] = 0
    cache = QuantizedCache(model.config, config, attention_mask=mask)
    run(model, cache, ids, (280, *[1] * 5), mask)
    rows = torch.tensor([1, 1, 0])
    expected = run(model, copy.deepcopy(cache), ids, [1] * 100, mask)
    cache.reorder_cache(rows)
    got = run(model, cache, ids[rows], [1] * 100, mask[rows])
    # The first tokens of row 1 come only now: they are its sinks, though columns before them are retired.
    seen = mask[rows, 285:385].bool()
    torch.testing.assert_close(got[seen], expected[rows][seen], rtol=0, atol=ROUNDING)
    options = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": "kvquant", "cache_config": config}
    one = model.generate(ids[:1], **options, num_beams=1)
    several = model.generate(ids[:1], **options, num_beams=3, return_dict_in_generate=True)
    assert one.shape == several.sequences.shape
    assert several[CACHE].routes["decode_dequantized"] == 0


def test_assisted_decoding():
    model, assistant, ids = build(), build(seed=1), families.prompt(1, 250)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    choice = {"cache_implementation": "kvquant", "cache_config": windowed("int8")}
    plain = model.generate(ids, **options, **choice)
    assisted = model.generate(ids, **options, **choice, assistant_model=assistant)
    assert torch.equal(plain.sequences, assisted.sequences)
    assert len(evicting(assisted[CACHE])) == 2


# --- going back, and files


@every_config
@pytest.mark.parametrize("removed", [1, 64])
def test_a_crop(config, removed):
    check_crop(build(dtype=torch.float64), windowed(config), families.prompt(1, 500), removed)


def test_a_crop_that_needs_what_is_evicted_changes_nothing():
    check_crop_of_too_much(build(), windowed("int4"), families.prompt(1, 500), layers=2)


@every_config
def test_save_and_load(config, tmp_path):
    model, ids = build(), families.prompt(2, 500)
    mask = padding(2, 500)
    cache = QuantizedCache(model.config, windowed(config), attention_mask=mask)
    run(model, cache, ids, (300, *[1] * 3), mask)
    path = tmp_path / "cache.safetensors"
    cache.save(path, model)
    loaded = QuantizedCache.load(path, model)
    assert [layer.dropped for layer in evicting(loaded)] == [layer.dropped for layer in evicting(cache)] != [0, 0]
    turns = (*[1] * 100, 40)
    assert torch.equal(run(model, loaded, ids, turns, mask), run(model, cache, ids, turns, mask))


def dense_attention(module, query, key, value, mask, **kwargs):
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2), None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", ["int8-plain", "int4", "windows", "many-sinks", "dense-keys", "dense"])
def test_random_sequences(config, seed, tmp_path):
    """Appends, crops, choices of rows, padding and files, against a cache that keeps every token."""
    choose, config = random.Random(seed), windowed(config)
    torch.manual_seed(seed)
    model, path = families.config("llama", num_hidden_layers=1), tmp_path / "cache.safetensors"
    mask = torch.ones(3, 5000, dtype=torch.long)
    for row in range(3):
        mask[row, : choose.choice([0, 0, 3, 60, 200])] = 0
    cache = QuantizedCache(model, config, attention_mask=mask)
    whole = QuantizedCache(model, dataclasses.replace(config, window_length=10_000), attention_mask=mask)
    cache.enable_fused()
    whole.enable_fused()
    length = furthest = 0
    for _ in range(60):
        n = choose.choice([1, 1, 1, 5, 32, 33, 150])
        new, query = torch.randn(2, 3, 2, n, 16), torch.randn(3, 4, n, 16)
        seen = rule(config, 3)(length, n, mask)
        length += n
        furthest = max(furthest, length)
        full = torch.ones(n, length, dtype=torch.bool).tril(length - n) & mask[:, None, None, :length].bool()
        outputs = []
        for each, given in ((cache, full), (whole, seen)):
            states = each.update(*new, 0)
            outputs.append(attend(None, query, *states, given, dense_attention=dense_attention)[0])
        real = mask[:, length - n : length].bool()
        torch.testing.assert_close(outputs[0][real], outputs[1][real], rtol=0, atol=ROUNDING)
        assert cache.get_seq_length() == length
        action = choose.choice(["append", "append", "crop", "rows", "file"])
        if action == "crop" and (most := min(ROLLBACK, length - furthest + ROLLBACK, length - 1)) > 0:
            removed = choose.randint(1, most)
            cache.crop(-removed)
            whole.crop(-removed)
            length -= removed
        elif action == "rows":
            rows = torch.tensor([choose.randrange(3) for _ in range(3)])
            cache.reorder_cache(rows)
            whole.reorder_cache(rows)
            mask = mask[rows]
        elif action == "file":
            cache.save(path)
            cache = QuantizedCache.load(path, model)
    assert cache.routes == whole.routes
    assert cache.layers[0].dropped


@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_an_interruption_while_a_layer_stores(written, n, monkeypatch):
    tokens, real = torch.randn(2, 1, 2, 400, 16), ops.quantize_append
    caches = [QuantizedCache(families.config("llama", num_hidden_layers=1), windowed("int4")) for _ in range(2)]
    for each in caches:
        each.enable_fused()
        each.update(*tokens[:, :, :, :300], 0)

    def interrupted(*args, **kwargs):
        if written:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "quantize_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            caches[0].update(*tokens[:, :, :, 300 : 300 + n], 0)
    caches[0].crop(0)
    query, got = torch.randn(1, 4, 30, 16), []
    for each in caches:
        states = each.update(*tokens[:, :, :, 370:], 0)
        got.append(attend(None, query, *states, None, dense_attention=None)[0])
    assert torch.equal(*got)


# --- scoring


@pytest.mark.parametrize("name", ["llama", "gemma3_window", "deepseek_v3"])
@pytest.mark.parametrize("config", ["int8", "int4", "windows", "long-recent", "dense"])
def test_scored_as_decoded(name, config):
    # Token by token takes longest.
    steps = 1 if config == "windows" else 5
    model, ids, config = build(name, dtype=torch.float64), families.prompt(2, 330), windowed(config)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    for context, chunk in ((10, steps), (200, 7)):
        expected = score_by_decoding(model, ids, context, config, mask, chunk=chunk)
        for length in (256, 512):
            got = score(model, ids, context, config, mask, chunk_length=length)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


# --- what is refused


@pytest.mark.parametrize("value", [0, -5, True, 3.5, None, "dense", [512]])
def test_other_windows_are_refused(value):
    told = "window_length: .* is not allowed; expected an integer from 1 on or 'all'"
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(CONFIGS["int8"], window_length=value)
    if value is not None:
        with pytest.raises(ValueError, match=rf"layers\.3\.{told}"):
            dataclasses.replace(CONFIGS["int8"], layers={3: LayerOverride(window_length=value)})


def test_static_caches_are_refused():
    told = r"window_length: 24 is not allowed with static: true, .*; expected 'all'"
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(windowed("int8"), static=True)
    with pytest.raises(ValueError, match=rf"layers\.1\.{told}"):
        dataclasses.replace(CONFIGS["int8"], static=True, layers={1: LayerOverride(window_length=24)})


def test_layers_with_windows_of_their_own():
    with pytest.raises(ValueError, match="window_length: 24 is not allowed for mistral, whose layers all have"):
        QuantizedCache(MistralConfig(), windowed("int8"))
    # A window that hides nothing is still the layer's own.
    with pytest.raises(ValueError, match="window_length: 24 is not allowed for mistral"):
        QuantizedCache(MistralConfig(), windowed("int8"), max_length=100)
    model = families.config("gemma3_window")
    config = dataclasses.replace(CONFIGS["int8"], layers={0: LayerOverride(window_length=24)})
    with pytest.raises(ValueError, match=r"layers\.0\.window_length: 24 is not allowed for a sliding layer"):
        QuantizedCache(model, config)
    assert [type(layer) is EvictingQuantizedLayer for layer in QuantizedCache(model, windowed("int8")).layers] == [
        False, True, False
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_attention_code_of_a_models_own(name):
    """Its masks have all tokens, and nothing would tell it which are left."""
    model, ids = families.build(name, attn="eager"), families.prompt(1, 40)
    cache = QuantizedCache(model.config, windowed("int8", 30))
    plain = QuantizedCache(model.config, "int8")
    turns = (20, *[1] * 10)
    assert torch.equal(run(model, cache, ids, turns), run(model, plain, ids, turns))
    with pytest.raises(ValueError, match="window_length: 30 tokens cannot be the window of layer 0: its attention"):
        run(model, cache, ids, (1,))


def test_a_plain_call_outside_of_our_attention():
    model, ids = build(), families.prompt(1, 60)
    cache = QuantizedCache(model.config, windowed("int8"))
    with torch.no_grad():
        model(ids[:, :50], **{CACHE: cache})
        with pytest.raises(ValueError, match=r"inside of hf_kvquant\.attention\(model\), or set window_length"):
            model(ids[:, 50:51], **{CACHE: cache})


def test_a_position_bias():
    model, ids = build("t5"), families.prompt(1, 20)
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "kvquant"}
    with pytest.raises(ValueError, match="window_length: 8 tokens cannot be the window of attention with a position"):
        model.generate(ids, **options, cache_config=windowed("int8", 8))
    assert model.generate(ids, **options, cache_config=windowed("int8", 30)).shape == (1, 21)


def test_continuous_batching():
    try:
        host.continuous_batching()
    except ImportError as error:
        pytest.skip(str(error))
    model = build()
    in_a_layer = dataclasses.replace(CONFIGS["int8"], layers={1: LayerOverride(window_length=24)})
    for config in (windowed("int8"), in_a_layer):
        asked = GenerationConfig(cache_implementation="kvquant", cache_config=config.to_dict(), max_new_tokens=2)
        options = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        with pytest.raises(ValueError, match=r"window_length: \[24\] is not served .*; expected 'all'"):
            model.generate_batch([[5, 6, 7]], generation_config=asked, continuous_batching_config=options)


def test_a_mask_that_does_not_fit():
    model = families.config("llama", num_hidden_layers=1)
    cache = QuantizedCache(model, windowed("int8"))
    cache.update(*torch.randn(2, 1, 2, 200, 64), 0)
    cache.enable_fused()
    keys, values = cache.update(*torch.randn(2, 1, 2, 1, 64), 0)
    query = torch.randn(1, 4, 1, 64)
    with pytest.raises(ValueError, match=r"mask: \(1, 200\) does not fit a layer that has evicted .*; expected 201"):
        attend(None, query, keys, values, torch.ones(1, 200), dense_attention=None)
