"""The static cache: it equals the growing one, in storage of a fixed size, and its steps compile once."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from unittest import mock

import families
import pytest
import torch
import transformers
from captured import Recorded
from torch._dynamo.utils import counters
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import CompileConfig

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, static
from hf_kvquant.config import LayerOverride
from hf_kvquant.host import CACHE
from hf_kvquant.hybrid import StaticQuantizedHybridLayer
from hf_kvquant.measure.families import PRESETS
from hf_kvquant.route import learn_route
from hf_kvquant.static import StaticQuantizedLayer

WINDOWS = KVQuantConfig(
    QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", group_size=16, rotate=True), sink_length=5,
    recent_length=9,
)  # fmt: skip
VALUE_BLOCKS = dataclasses.replace(WINDOWS, values=QuantSpec("int8", "channel", block_length=32))
EAGER = ("gemma2", "gpt_oss", "gptj")
# Families with every kind of layer that a model may have beside ours, and some that read de-quantized states.
FAMILIES = [
    "llama", "gemma3", "gpt_oss", "jamba", "falcon_h1", "bart", "falcon", "deepseek_v3", "mistral_window",
    "gemma3_window",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("narrow_windows")
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-5}


@pytest.fixture(autouse=True)
def fresh():
    """Forget compiled code of other tests, and ignore the warning that some models read de-quantized states."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def build(name: str = "llama", dtype: torch.dtype = torch.float32, **options):
    attn = "eager" if name in EAGER else "sdpa"
    small = {} if name == "falcon" else families.small(name)
    return families.build(name, dtype=dtype, attn=attn, **small, **options)


def on_the_cpu(backend: str = "eager") -> CompileConfig:
    """Lets `generate` compile on a CPU, where it must be asked to; a graph break is an error. Tracing is the same for
    every backend."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return config


def prompt(length: int = 70, padded: int = 5) -> dict:
    ids = families.prompt(2, length)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, given: dict | None = None, n: int = 12, **kwargs):
    given = prompt() if given is None else given
    if model.config.is_encoder_decoder:
        given = {f"decoder_{name}": tensor for name, tensor in given.items()} | {"input_ids": families.prompt(2, 20)}
    options = {"do_sample": False, "max_new_tokens": n, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**(given | options | kwargs))


def own(out) -> QuantizedCache:
    cache = out.past_key_values
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def distance(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def graphs() -> int:
    found = counters["stats"]["unique_graphs"]
    counters.clear()
    return found


def stored(cache: QuantizedCache) -> dict[str, torch.Tensor]:
    """The tensors that the cache would save, by name: bytes, windows and sinks."""
    found = {}
    for i, layer in enumerate(cache.quantized_layers):
        state = layer.state()
        sides = {name: state.pop(name) for name in ("keys", "values")}
        for where, values in {"": state, **sides}.items():
            found |= {f"{i}.{where}.{name}": x for name, x in values.items() if isinstance(x, torch.Tensor)}
    return {name: x for name, x in found.items() if not name.endswith(".padding")}


def assert_same(a: QuantizedCache, b: QuantizedCache) -> None:
    left, right = stored(a), stored(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert a.routes == b.routes
    assert int(a.get_seq_length()) == int(b.get_seq_length())


# --- what it is


@pytest.mark.parametrize("preset", PRESETS)
def test_generate_makes_one(preset):
    cache = generate(build(), cache_implementation=f"kvquant-{preset}-static", n=2).past_key_values
    assert type(cache) is QuantizedCache
    assert cache.kv_config == dataclasses.replace(KVQuantConfig.preset(preset), static=True)
    assert {type(layer) for layer in cache.layers} == {StaticQuantizedLayer}
    assert cache.is_compileable
    assert cache.routes["decode_fused"] == 2


def test_a_config_may_say_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("keys: {format: int8}\nvalues: {format: int8}\nstatic: true\n")
    cache = generate(build(), cache_implementation="kvquant", cache_config=path, n=2).past_key_values
    assert {type(layer) for layer in cache.layers} == {StaticQuantizedLayer}


def test_max_cache_len_is_honoured_and_remembered():
    """A shorter call is given the longer storage, so that it finds compiled code that fits."""
    model = build()
    name = "kvquant-int8-static"
    assert generate(model, cache_implementation=name).past_key_values.get_max_length() == 70 + 12 - 1
    assert generate(model, cache_implementation=name, max_cache_len=200).past_key_values.get_max_length() == 200
    assert generate(model, cache_implementation=name).past_key_values.get_max_length() == 200


def test_storage_is_allocated_at_once():
    model = build()
    cache = generate(model, cache_implementation="kvquant-int8-static", max_cache_len=640).past_key_values
    report = cache.memory_report()
    side = 2 * 2 * 640 * 16 + 2 * 2 * (640 // 64) * 16 * 2 * 2, 2 * 2 * 640 * 16 + 2 * 2 * 640 * 2
    assert report["codes"] + report["scales"] + report["slack"] == 2 * sum(side)
    assert report["total"] == sum(report[part] for part in ("codes", "scales", "dense", "slack"))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_are_not_ours_are_transformers_static_ones(name):
    model = build(name)
    ours = own(generate(model, cache_implementation="kvquant-int4-static", n=2))
    theirs = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=71)
    for layer, native in zip(ours.layers, theirs.layers, strict=True):
        assert layer.is_compileable
        if isinstance(layer, (StaticQuantizedLayer, StaticQuantizedHybridLayer)):
            assert native.is_sliding == layer.is_sliding
            assert not layer.is_sliding or name in families.SLIDING
        else:
            assert type(layer) is type(native)
    assert len(ours.quantized_layers) == families.ALL[name].num_full


# --- outside of a compiled step: the growing cache, to the bit


@pytest.mark.parametrize("padded", [0, 5], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [None, 40, 20], ids=["whole", "chunks40", "chunks20"])
@pytest.mark.parametrize("config", [*PRESETS, WINDOWS, VALUE_BLOCKS], ids=[*PRESETS, "windows", "value-blocks"])
def test_equals_the_growing_cache_to_the_bit(config, chunk, padded):
    model, config = build(), KVQuantConfig.load(config)
    options = {"cache_implementation": "kvquant", "prefill_chunk_size": chunk, "given": prompt(padded=padded)}
    grown = generate(model, cache_config=config, **options)
    fixed = generate(model, cache_config=dataclasses.replace(config, static=True), **options)
    assert distance(grown, fixed) == 0
    assert_same(own(grown), own(fixed))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_growing_cache_in_every_kind_of_model(name):
    """Models that read de-quantized states read all of the storage, and so sum in another order."""
    model = build(name)
    grown = generate(model, cache_implementation="kvquant-int4")
    fixed = generate(model, cache_implementation="kvquant-int4-static")
    limit = 0 if families.ALL[name].fused else ROUNDING[torch.float32]
    assert distance(grown, fixed) <= limit
    assert own(grown).routes == own(fixed).routes


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"assistant": True}], ids=str)
def test_other_ways_to_generate(mode):
    model = build()
    given = {"input_ids": families.prompt(1, 70)}
    if "assistant" in mode:
        mode = {"assistant_model": build(num_hidden_layers=1)}
    grown = generate(model, given, cache_implementation="kvquant-int4", **mode)
    fixed = generate(model, given, cache_implementation="kvquant-int4-static", **mode)
    assert torch.equal(grown.sequences, fixed.sequences)
    assert distance(grown, fixed) == 0
    assert own(grown).routes == own(fixed).routes


@pytest.mark.parametrize("padded", [0, 5], ids=["plain", "padded"])
@pytest.mark.parametrize(("name", "dense"), [("llama", 0), ("llama", 1), ("falcon", 1), ("t5", 1)])
def test_beside_layers_that_stay_dense(name, dense, padded):
    """Dense static layers return all of the storage, also after a prefill, and one mask serves all layers."""
    model = build(name)
    config = dataclasses.replace(WINDOWS, layers=((dense, LayerOverride(QuantSpec("dense"), QuantSpec("dense"))),))
    options = {"given": prompt(padded=padded), "cache_implementation": "kvquant"}
    expected = generate(model, cache_config=config, **options)
    config = dataclasses.replace(config, static=True)
    for compiled in (None, on_the_cpu()) if name == "llama" and padded else (None,):
        out = generate(model, cache_config=config, compile_config=compiled, **options)
        assert type(own(out).layers[dense]) is StaticLayer
        assert distance(out, expected) <= ROUNDING[torch.float32]
        assert own(out).routes == own(expected).routes


# --- compiled


@pytest.mark.parametrize(
    "preset", [name if name == "int4" else pytest.param(name, marks=pytest.mark.any_host) for name in PRESETS]
)
def test_one_graph_serves_a_generation_and_the_next(preset):
    model, name = build(), f"kvquant-{preset}-static"
    expected = generate(model, cache_implementation=name)
    for compiled in (1, 0):
        out = generate(model, cache_implementation=name, compile_config=on_the_cpu("aot_eager"))
        assert graphs() == compiled
        assert not counters["graph_break"]
        assert torch.equal(out.sequences, expected.sequences)
        assert distance(out, expected) <= ROUNDING[torch.float32]
        assert own(out).routes == own(expected).routes


def test_padding_and_a_shorter_prompt_need_no_other_graph():
    model, name = build(), "kvquant-int4-static"
    generate(model, cache_implementation=name, compile_config=on_the_cpu(), max_cache_len=100)
    assert graphs() == 1
    for given in (prompt(padded=0), prompt(length=50, padded=20), prompt(length=33, padded=3)):
        expected = generate(model, given, cache_implementation="kvquant-int4")
        out = generate(model, given, cache_implementation=name, compile_config=on_the_cpu())
        assert distance(out, expected) <= ROUNDING[torch.float32]
    assert graphs() == 0


def test_prompts_that_need_more_room_need_no_graph_each():
    """The second length shows that lengths vary. (On the channel grid, so does a second number of blocks.)"""
    model, name, needed = build(), "kvquant-int8-plain", []
    for length in (40, 47, 55, 90):
        given = prompt(length)
        out = generate(model, given, cache_implementation=f"{name}-static", compile_config=on_the_cpu(), n=4)
        needed.append(graphs())
        assert distance(out, generate(model, given, cache_implementation=name, n=4)) <= ROUNDING[torch.float32]
    assert needed == [1, 1, 0, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_graphs_as_transformers_static_cache(name):
    """transformers' sliding layers are compiled once more when they are full; those that are quantized are not."""
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = build(name, **(kinds if name in ("gemma3", "gpt_oss", "gemma3_window") else {}))
    needed = []
    expected = generate(model, cache_implementation="kvquant-int4")
    for cache in ("static", "kvquant-int4-static"):
        torch._dynamo.reset()
        for _ in range(2):
            out = generate(model, cache_implementation=cache, compile_config=on_the_cpu())
            needed.append(graphs())
    assert needed[2:] == ([1, 0] if name in families.SLIDING else needed[:2])
    assert needed[3] == 0
    assert distance(out, expected) <= ROUNDING[torch.float32]
    routes = own(expected).routes
    if name == "falcon":
        # Its own attention code is recorded outside of compiled steps only.
        routes |= {"decode_fused": 0, "decode_dequantized": routes["decode_fused"]}
    assert own(out).routes == routes


@pytest.mark.any_host
@pytest.mark.parametrize("config", ["int4", WINDOWS], ids=["int4", "windows"])
def test_compiled_for_the_processor(config):
    """Compiled by inductor in float64, it equals the growing cache up to rounding."""
    model, config = build(dtype=torch.float64), KVQuantConfig.load(config)
    expected = generate(model, cache_implementation="kvquant", cache_config=config)
    config = dataclasses.replace(config, static=True)
    out = generate(model, cache_implementation="kvquant", cache_config=config, compile_config=on_the_cpu("inductor"))
    assert graphs() == 1
    assert distance(out, expected) <= ROUNDING[torch.float64]
    assert own(out).routes == own(expected).routes


@pytest.mark.any_host
def test_compiled_in_float32_few_codes_flip():
    """A new token's code may round the other way, by one step; the prompt's bytes are the same."""
    model = build()
    expected = generate(model, cache_implementation="kvquant-int8-plain")
    out = generate(model, cache_implementation="kvquant-int8-plain-static", compile_config=on_the_cpu("inductor"))
    for a, b in zip(own(expected).quantized_layers, own(out).quantized_layers):
        for side in ("_keys", "_values"):
            left, right = (getattr(layer, side).data[:, :, : layer.length].view(torch.int8) for layer in (a, b))
            assert torch.equal(left[:, :, :70], right[:, :, :70])
            flips = (left.int() - right.int()).abs()
            assert flips.max() <= 1
            assert flips.count_nonzero() <= 1e-3 * flips.numel()


@pytest.mark.parametrize("chunk", [40, 20], ids=["long", "short"])
def test_a_prefill_in_chunks_is_compiled_too(chunk):
    model, given = build(), prompt(length=120)
    expected = generate(model, given, cache_implementation="kvquant-int4", prefill_chunk_size=chunk)
    options = {"prefill_chunk_size": chunk, "compile_config": on_the_cpu()}
    for compiled in (3, 0):  # the first chunk, later ones, and steps
        out = generate(model, given, cache_implementation="kvquant-int4-static", **options)
        assert graphs() == compiled
        assert distance(out, expected) <= ROUNDING[torch.float32]
        assert own(out).routes == own(expected).routes


def loop(model, forward, cache, n: int = 20):
    """A user's own loop: prefill and n steps; `forward` takes the steps."""
    given = prompt()
    with torch.no_grad(), hf_kvquant.attention(model):
        out = model(**given, past_key_values=cache)
        logits = [out.logits[:, -1:]]
        for _ in range(n):
            logits.append(forward(logits[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(logits, 1)


def test_a_loop_of_a_users_own():
    model = build()
    mask = prompt()["attention_mask"]
    grown = QuantizedCache(model.config, "int4", attention_mask=mask)
    expected = loop(model, model, grown)
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for compiled in (1, 0):
        cache = QuantizedCache(model.config, "int4-static", max_length=150, attention_mask=mask)
        logits = loop(model, forward, cache)
        assert graphs() == compiled
        assert (logits - expected).abs().max() <= ROUNDING[torch.float32]
        assert cache.get_seq_length() == 90
    # Plain calls go on where the compiled ones stopped.
    with torch.no_grad(), hf_kvquant.attention(model):
        for c in (grown, cache):
            c.crop(-3)
            c.last = model(families.prompt(2, 40), past_key_values=c).logits
    assert (grown.last - cache.last).abs().max() <= ROUNDING[torch.float32]


def test_export():
    """The exported program of a step runs, with the operators in it. It is strict, because the other mode of
    torch.export treats the tensors of a cache as constants (of transformers' StaticCache too)."""
    model = build()
    caches = [QuantizedCache(model.config, "int4-static", max_length=90) for _ in range(2)]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.cache = model, caches[0]

        def forward(self, ids):
            return self.model(ids, past_key_values=self.cache).logits

    ids = families.prompt(2, 1)
    with torch.no_grad(), hf_kvquant.attention(model):
        for cache in caches:
            model(families.prompt(2, 70), past_key_values=cache)
        expected = model(ids, past_key_values=caches[1]).logits
        program = torch.export.export(Step(), (ids,), strict=True)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("kvquant.quantize_append" in name for name in called) == 2
    assert sum("kvquant.decode_attention" in name for name in called) == 2
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), expected, rtol=0, atol=ROUNDING[torch.float32])


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_the_cache_as_an_argument(strict):
    """The program writes to the cache that it is called with: one token more at every call."""
    hf_kvquant.register_for_export()
    hf_kvquant.register_for_export()
    model, ids = build(), families.prompt(2, 76)
    caches = [QuantizedCache(model.config, "int4-static", max_length=90) for _ in range(2)]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, cache):
            return self.model(ids, **{CACHE: cache}).logits

    with torch.no_grad(), hf_kvquant.attention(model):
        for cache in caches:
            model(ids[:, :70], **{CACHE: cache})
        program = torch.export.export(Step(), (ids[:, 70:71], caches[0]), strict=strict)
        assert caches[0].get_seq_length() == 70
        for i in range(70, 76):
            logits = program.module()(ids[:, i : i + 1], caches[0])
            expected = model(ids[:, i : i + 1], **{CACHE: caches[1]}).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING[torch.float32])
    assert [layer.length for layer in caches[0].layers] == [76, 76]
    assert caches[0].routes == caches[1].routes


@pytest.mark.parametrize(("name", "preset"), [("gemma3", "int8-static"), ("llama", "int8")])
def test_caches_that_cannot_be_exported(name, preset):
    hf_kvquant.register_for_export()
    model = build(name)
    cache = QuantizedCache(model.config, preset, max_length=90)
    with torch.no_grad(), hf_kvquant.attention(model):
        model(families.prompt(2, 70), **{CACHE: cache})
    with pytest.raises(ValueError, match="layer 0: a .* cannot be exported; expected a static cache"):
        torch.utils._pytree.tree_flatten(cache)


def test_lengths_and_counters_are_no_python_numbers():
    """Everything that a step reads is on the device, and stays at its address."""
    model = build()
    cache = QuantizedCache(model.config, "int4-static", max_length=100)
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad(), hf_kvquant.attention(model):
        model(families.prompt(2, 70), past_key_values=cache)
        layer = cache.layers[0]
        places = [tensor.data_ptr() for tensor in layer._tensors()]
        forward(families.prompt(2, 1), past_key_values=cache)
        assert layer._length is None
        assert isinstance(cache.get_seq_length(), torch.Tensor)
        assert layer.device_length == 71
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-1)
    assert cache.get_seq_length() == 70
    assert [tensor.data_ptr() for tensor in layer._tensors()] == places


# --- the end of the storage


def test_no_room_is_an_error_before_anything_is_written():
    model = build()
    cache = QuantizedCache(model.config, "int4-static", max_length=72)
    with torch.no_grad(), hf_kvquant.attention(model):
        model(families.prompt(2, 70), past_key_values=cache)
        before = copy.deepcopy(stored(cache))
        with pytest.raises(ValueError, match="max_length: 72 tokens have no room for 73"):
            model(families.prompt(2, 3), past_key_values=cache)
        cache.crop(0)
        assert all(torch.equal(before[name], now) for name, now in stored(cache).items())
        model(families.prompt(2, 2), past_key_values=cache)
    assert cache.get_seq_length() == 72


def test_a_prompt_that_is_too_long():
    model = build()
    with torch.no_grad(), hf_kvquant.attention(model), pytest.raises(ValueError, match="max_length: 60 .* for 70"):
        model(families.prompt(2, 70), past_key_values=QuantizedCache(model.config, "int4-static", max_length=60))


def test_a_compiled_step_drops_what_has_no_room_and_the_next_call_says_so():
    model = build()
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = QuantizedCache(model.config, "int8-plain-static", max_length=80)
    loop(model, forward, cache, n=10)
    layer = cache.layers[0]
    before = [tensor.clone() for tensor in (layer._keys.data, layer._keys.scale, layer._values.data)]
    with torch.no_grad(), hf_kvquant.attention(model):
        for _ in range(3):
            forward(families.prompt(2, 1), past_key_values=cache)
    for old, new in zip(before, (layer._keys.data, layer._keys.scale, layer._values.data)):
        assert torch.equal(old, new)
    words = "max_length: 80 tokens have no room for 3 that compiled steps added to layer 0"
    for call in (
        lambda: model(families.prompt(2, 1), past_key_values=cache),
        lambda: cache.crop(-5),
        lambda: cache.save("nowhere"),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.memory_report(),
    ):
        with torch.no_grad(), hf_kvquant.attention(model), pytest.raises(ValueError, match=words):
            call()
    cache.reset()
    assert cache.get_seq_length() == 0
    loop(model, forward, cache, n=10)
    assert cache.get_seq_length() == 80


def test_a_given_cache_that_is_too_short():
    """It is refused before its first token, too: transformers' layers would stay as short as they are."""
    model = build()
    for cache in (own(generate(model, n=2, cache_implementation="kvquant-int4-static")), None):
        cache = QuantizedCache(model.config, "int4-static", max_length=71) if cache is None else cache
        with pytest.raises(ValueError, match="max_length: 71 tokens have no room for 83"):
            generate(model, prompt(72), past_key_values=cache)


# --- the rest of a cache's life


def append(cache: QuantizedCache, n: int, traced: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 2, 2, n, 64, generator=generator)
    with mock.patch.object(static, "is_traced", return_value=traced):
        returned = cache.update(*states, 0)
    if isinstance(returned[0], torch.Tensor):
        learn_route(*returned)


@pytest.mark.parametrize("config", ["int4", "int8-plain", WINDOWS], ids=["int4", "int8-plain", "windows"])
def test_what_a_compiled_step_stored_can_be_cropped(config):
    """The crop may reach beyond the exact window, and the host has to read the length first."""
    model_config = families.config("llama", num_hidden_layers=1)
    config = KVQuantConfig.load(config)
    grown = QuantizedCache(model_config, config)
    fixed = QuantizedCache(model_config, dataclasses.replace(config, static=True), max_length=400)
    for cache in (grown, fixed):
        append(cache, 70, traced=False)
        for i in range(8):
            append(cache, 30, traced=True, seed=i)
        cache.crop(-100)
        append(cache, 20, traced=True, seed=9)
    assert_same(grown, fixed)
    assert fixed.routes["window_lost"] == (config != KVQuantConfig.preset("int8-plain"))


def test_save_and_load(tmp_path):
    model, path = build(), tmp_path / "cache.safetensors"
    cache = generate(model, cache_implementation="kvquant-int4-static", compile_config=on_the_cpu()).past_key_values
    cache.save(path, model)
    with pytest.raises(ValueError, match="max_length: None is not allowed for a static cache; expected"):
        QuantizedCache.load(path, model)
    with pytest.raises(ValueError, match="max_length: 50 tokens have no room for 81"):
        QuantizedCache.load(path, model, max_length=50)
    loaded = QuantizedCache.load(path, model, max_length=200)
    assert loaded.get_max_length() == 200
    assert_same(cache, loaded)
    token = families.prompt(2, 1)
    with torch.no_grad(), hf_kvquant.attention(model):
        for c in (cache := copy.deepcopy(loaded), loaded):
            c.logits = model(token, past_key_values=c).logits
    assert torch.equal(cache.logits, loaded.logits)


def test_a_file_can_be_loaded_in_inference_mode(tmp_path):
    """The tensors of the file can then be written outside of inference mode."""
    model, path = build("gemma3"), tmp_path / "cache.safetensors"
    own(generate(model, cache_implementation="kvquant-int4-static", n=2)).save(path, model)
    with torch.inference_mode():
        cache = QuantizedCache.load(path, model, max_length=90)
    cache.set_padding(torch.ones(2, 90))
    with torch.no_grad(), hf_kvquant.attention(model):
        model(families.prompt(2, 3), past_key_values=cache)
    assert cache.get_seq_length() == 74


def test_a_file_whose_window_hid_nothing_becomes_longer(tmp_path):
    """A window of 24 tokens hides nothing in a cache for 20; in a longer one the masks apply it."""
    model, path = build("gemma3"), tmp_path / "cache.safetensors"
    ids, logits = families.prompt(2, 34), []
    cache = QuantizedCache(model.config, "int8-static", max_length=20)
    with torch.no_grad(), hf_kvquant.attention(model):
        model(ids[:, :15], **{CACHE: cache})
        cache.save(path, model)
        loaded = QuantizedCache.load(path, model, max_length=40)
        assert [type(layer) for layer in loaded.layers] == [StaticQuantizedLayer] * 3
        short = QuantizedCache(model.config, "int8", max_length=20)
        model(ids[:, :15], **{CACHE: short})
        for c in (loaded, short):
            steps = [model(ids[:, i : i + 1], **{CACHE: c}).logits for i in range(15, 34)]
            logits.append(torch.cat(steps, 1))
    assert (logits[0] - logits[1]).abs().max() < ROUNDING[torch.float32]


def test_new_tensors_are_marked_as_staying_in_place(tmp_path):
    """Without the mark CUDA graphs would copy them at every step."""
    model, path = build("gemma3"), tmp_path / "cache.safetensors"
    cache = own(generate(model, cache_implementation="kvquant-int4-static", n=2))

    def unmarked(cache):
        tensors = [tensor for layer in cache.quantized_layers for tensor in layer._tensors()]
        tensors += [tensor for layer in cache.layers for tensor in vars(layer).values()]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return sum(getattr(tensor, "_dynamo_static_input_type", None) is None for tensor in tensors)

    assert unmarked(cache) == unmarked(copy.deepcopy(cache)) == 0
    cache.save(path, model)
    assert unmarked(QuantizedCache.load(path, model, max_length=90)) == 0
    layer = cache.quantized_layers[0]
    for change in (lambda: layer.batch_repeat_interleave(2), lambda: layer.batch_select_indices(torch.tensor([0]))):
        change()
        assert not [t for t in layer._tensors() if getattr(t, "_dynamo_static_input_type", None) is None]


def test_routes_of_compiled_steps_are_counted_once():
    """An append counts its states as fused; another route, or a second attention to them, corrects that."""
    routes = static.DeviceRoutes(torch.device("cpu"))
    for counted in (("decode_fused",), ("decode_dequantized",), ("decode_fused", "decode_fused")):
        routes.counted_appends()[1] += 1
        for route in counted:
            routes.count(route)
    for _ in range(2):  # two appends of one update, whose states nothing has attended to yet
        routes.counted_appends()[1] += 1
    assert routes.known() == {"decode_fused": 3, "decode_dequantized": 1, "prefill_dense": 0, "window_lost": 0}


def test_what_was_interrupted_is_forgotten_on_the_device_too():
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), "int4-static", max_length=90)
    append(cache, 70, traced=False)
    layer = cache.layers[0]
    layer.storing = True
    layer.device_length += 3
    cache.crop(0)
    assert int(layer.device_length) == layer.length == 70


def test_the_states_can_be_looked_at_in_a_compiled_step():
    """Mllama does this to see whether there are any."""
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), "int4-static", max_length=90)
    with mock.patch.object(static, "is_traced", return_value=True):
        assert cache.layers[0].keys is None
    append(cache, 70, traced=False)
    layer = cache.layers[0]
    for name in ("keys", "values"):
        known = getattr(layer, name)
        with mock.patch.object(static, "is_traced", return_value=True):
            whole = getattr(layer, name)
        assert torch.equal(whole[:, :, :70], known)
        assert whole.shape[2] == 90
        assert not whole[:, :, 70:].any()


@pytest.mark.parametrize("name", ["Bloom", "GPTNeo", "Git", "ProphetNet"])
def test_models_that_take_columns_for_tokens_are_refused(name):
    config = getattr(transformers, f"{name}Config")()
    with pytest.raises(ValueError, match=f"static: True is not allowed for a model of type '{config.model_type}'"):
        QuantizedCache(config, "int8-static", max_length=10)
    assert QuantizedCache(config, "int8").quantized_layers


def test_refusals():
    model = build()
    with pytest.raises(ValueError, match="max_length: None is not allowed for a static cache; expected the number"):
        QuantizedCache(model.config, "int4-static")
    cache = generate(model, cache_implementation="kvquant-int4-static").past_key_values
    with pytest.raises(ValueError, match="max_length: 81 tokens have no room for 500"):
        cache.reserve(500)
    with pytest.raises(ValueError, match="static: 1 is not allowed; expected true or false"):
        KVQuantConfig.from_dict({"keys": {"format": "int8"}, "values": {"format": "int8"}, "static": 1})


@pytest.mark.parametrize("assistant_preset", [None, "int8-plain", "int8-plain-static"])
@pytest.mark.parametrize("preset", ["int8-plain", "int8-plain-static"])
def test_assisted_decoding(preset, assistant_preset):
    """An assistant's cache lives as long as its target's; a static one has room for the whole generation."""
    model, assistant = build(), build(num_hidden_layers=1)
    prompt = {"input_ids": families.prompt(1, 70)}
    plain = generate(model, prompt, cache_implementation=f"kvquant-{preset}", n=40)
    if assistant_preset is not None:
        assistant.generation_config.cache_implementation = f"kvquant-{assistant_preset}"
    seen = []
    hook = assistant.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs[CACHE]), with_kwargs=True)
    out = generate(model, prompt, cache_implementation=f"kvquant-{preset}", n=40, assistant_model=assistant)
    hook.remove()
    assert torch.equal(out.sequences, plain.sequences)
    assert own(out).kv_config.static == preset.endswith("static")
    assert len({id(cache) for cache in seen}) == 1
    if assistant_preset is not None:
        assert type(seen[0]) is QuantizedCache
        assert seen[0].kv_config == KVQuantConfig.preset(assistant_preset)
        assert seen[0].routes["decode_fused"] > 0 == seen[0].routes["decode_dequantized"]


def test_nonfinite_numbers_are_counted_in_a_compiled_step():
    cache = QuantizedCache(families.config("llama", num_hidden_layers=1), "int8-plain-static", max_length=90)
    append(cache, 70, traced=False)
    states = torch.randn(2, 2, 2, 1, 64)
    states[0, 0, 0, 0, 3] = torch.nan
    with mock.patch.object(static, "is_traced", return_value=True):
        cache.update(*states, 0)
    assert cache.routes["nonfinite"] == 1


def test_a_given_static_cache_is_used():
    model = build()
    cache = QuantizedCache(model.config, "int8-static", max_length=100)
    out = generate(model, past_key_values=cache, compile_config=on_the_cpu())
    assert out.past_key_values is cache
    assert graphs() == 1
    assert distance(out, generate(model, cache_implementation="kvquant-int8")) <= ROUNDING[torch.float32]


def test_beside_a_cross_attention_cache_of_its_own():
    out = generate(build("bart"), cache_implementation="kvquant-int4-static", n=3)
    assert isinstance(out.past_key_values.cross_attention_cache, StaticCache)
    out = generate(build("bart"), cache_implementation="kvquant-int4", n=3)
    assert isinstance(out.past_key_values.cross_attention_cache, DynamicCache)


@pytest.mark.parametrize(
    "kv_config", [*(f"{name}-static" for name in PRESETS), dataclasses.replace(WINDOWS, static=True)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_captured_step_asks_nothing_of_the_device(name, kv_config, monkeypatch):
    """A whole step of the model, hooks included, as torch.cuda.graph(..) captures it without torch.compile."""
    # Experts ask the device which of them have tokens.
    model = build(name, **{"first_k_dense_replace": 2} if name == "deepseek_v3" else {}).eval()
    cache = QuantizedCache(config=model.config, kv_config=kv_config, max_length=60)
    token = torch.tensor([[3]])
    with torch.no_grad(), hf_kvquant.attention(model):
        model(torch.arange(20)[None], past_key_values=cache)
        model(token, past_key_values=cache)
        with monkeypatch.context() as patch, Recorded():
            patch.setattr(static, "is_captured", lambda: True)
            model(token, past_key_values=cache)
        model(token, past_key_values=cache)
    assert cache.get_seq_length() == 23
    assert cache.routes["decode_dequantized"] == 0
