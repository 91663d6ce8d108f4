"""Our additions to transformers: names, one context, wrapped methods; and how all of it is taken away again."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager

import families
import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedConfig,
)
from transformers.generation import configuration_utils
from transformers.masking_utils import AttentionMaskInterface

import hf_kvquant
from hf_kvquant import KVQuantConfig, LayerOverride, QuantizedCache, QuantSpec, host, ops

CONFIG = KVQuantConfig(
    QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", group_size=32, rotate=True), sink_length=2,
    recent_length=5, layers={1: LayerOverride(values=QuantSpec("int8"))},
)  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return families.build("llama")


def generate(model, ids=None, **kwargs):
    ids = families.prompt() if ids is None else ids
    with torch.no_grad():
        return model.generate(ids, **(GREEDY | kwargs))


def implementations(model) -> list[str]:
    """The attention implementation of every config in the model, nested ones included."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config._attn_implementation for config in configs.values()]


def switched(model) -> bool:
    return any(name.startswith("kvquant|") for name in implementations(model))


# --- names, install, uninstall


def test_every_preset_is_a_cache_implementation():
    names = hf_kvquant.cache_implementations()
    assert names[0] == "kvquant"
    assert {"kvquant-int8", "kvquant-int8-plain", "kvquant-fp8", "kvquant-int4", "kvquant-int4-small"} <= set(names)
    for name in names:
        assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count(name) == 1
        GenerationConfig(cache_implementation=name).validate(strict=True)


def test_uninstall_and_install_again(model):
    wrapped = GenerationMixin.generate, GenerationMixin._prepare_cache_for_generation
    hf_kvquant.install()
    assert GenerationMixin.generate is wrapped[0]
    try:
        hf_kvquant.uninstall()
        hf_kvquant.uninstall()
        assert GenerationMixin.generate is wrapped[0].__wrapped__
        assert GenerationMixin._prepare_cache_for_generation is wrapped[1].__wrapped__
        assert not {*hf_kvquant.cache_implementations()} & {*configuration_utils.ALL_CACHE_IMPLEMENTATIONS}
        with pytest.raises(ValueError, match="kvquant-int8"):
            generate(model, cache_implementation="kvquant-int8")
        assert type(generate(model).past_key_values) is DynamicCache
    finally:
        hf_kvquant.install()
    assert type(generate(model, cache_implementation="kvquant-int8").past_key_values) is QuantizedCache


def test_other_names_pass_through(model):
    assert type(generate(model).past_key_values) is DynamicCache
    assert type(generate(model, cache_implementation="dynamic").past_key_values) is DynamicCache
    assert type(generate(model, cache_implementation="static").past_key_values).__name__ == "StaticCache"
    assert generate(model, use_cache=False).past_key_values is None


# --- the model is as it was


class Raise:
    """A logits processor that looks at the model while it generates, and then raises."""

    def __init__(self, model, error: BaseException):
        self.model, self.error, self.seen = model, error, None

    def __call__(self, input_ids, scores):
        self.seen = implementations(self.model)
        if input_ids.shape[1] > 72:
            raise self.error
        return scores


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_model_is_restored_after_an_exception(name, error):
    model = families.build(name, attn="eager")
    before = implementations(model)
    processor = Raise(model, error)
    given = {"decoder_input_ids": families.prompt(length=71)} if name == "t5" else {}
    with pytest.raises(type(error)):
        generate(model, cache_implementation="kvquant-int4", logits_processor=[processor], **given)
    assert set(processor.seen) == {"kvquant|eager"}
    assert set(before) == {"eager"}
    assert implementations(model) == before
    generate(model, cache_implementation="kvquant-int4")
    assert implementations(model) == before


def test_contexts_nest(model):
    with hf_kvquant.attention(model):
        with hf_kvquant.attention(model):
            assert set(implementations(model)) == {"kvquant|sdpa"}
        assert set(implementations(model)) == {"kvquant|sdpa"}
        generate(model, cache_implementation="kvquant-int4")
        assert set(implementations(model)) == {"kvquant|sdpa"}
    assert set(implementations(model)) == {"sdpa"}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generate_inside_the_context_of_an_encoder_decoder_model(name):
    """Their flat configs return a copy as the text config; no module reads a copy."""
    model = families.build(name)
    before = implementations(model)
    expected = generate(model, cache_implementation="kvquant-int4").sequences
    with hf_kvquant.attention(model):
        assert torch.equal(generate(model, cache_implementation="kvquant-int4").sequences, expected)
    assert implementations(model) == before


def test_two_models_of_one_config():
    first = families.build("llama")
    second = type(first)(first.config).eval()
    assert second.config is first.config
    with hf_kvquant.attention(first):
        with hf_kvquant.attention(second):
            assert switched(first)
        assert switched(second)
    assert not switched(first)


def test_two_models_with_two_bases():
    first, second = families.build("llama"), families.build("qwen3", attn="eager")
    with hf_kvquant.attention(first), hf_kvquant.attention(second):
        assert set(implementations(first)) == {"kvquant|sdpa"}
        assert set(implementations(second)) == {"kvquant|eager"}
    assert set(implementations(first) + implementations(second)) == {"sdpa", "eager"}


def test_attention_and_its_mask_are_registered(model):
    """Without the base's mask function a left-padded batch would be silently wrong."""
    with hf_kvquant.attention(model):
        assert "kvquant|sdpa" in AttentionInterface._global_mapping
        registered = AttentionMaskInterface._global_mapping
        assert registered["kvquant|sdpa"] is registered["sdpa"]


def test_a_registered_attention_stays_the_prefill_path():
    """Prefill calls a base that the user registered, as Hub kernels do, and the base finds its name in the config."""
    seen = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, query.shape[2]))
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("flash_of_mine", mine)
    AttentionMaskInterface.register("flash_of_mine", AttentionMaskInterface()["sdpa"])
    try:
        model = families.build("llama", attn="sdpa")
        model.config._attn_implementation = "flash_of_mine"
        out = generate(model, cache_implementation="kvquant-int8")
    finally:
        AttentionInterface._global_mapping.pop("flash_of_mine")
        AttentionMaskInterface._global_mapping.pop("flash_of_mine")
    assert seen == [("flash_of_mine", 70)] * 2
    assert out.past_key_values.routes["decode_fused"] == 14
    assert set(implementations(model)) == {"flash_of_mine"}


def test_a_base_that_is_registered_again_is_the_new_one():
    def version(n: int):
        def mine(*args, **kwargs):
            seen.append(n)
            return AttentionInterface()["sdpa"](*args, **kwargs)

        return mine

    seen: list[int] = []
    AttentionMaskInterface.register("mine_again", AttentionMaskInterface()["sdpa"])
    try:
        model = families.build("llama")
        model.config._attn_implementation = "mine_again"
        for n in (1, 2):
            AttentionInterface.register("mine_again", version(n))
            generate(model, cache_implementation="kvquant-int8")
    finally:
        AttentionInterface._global_mapping.pop("mine_again")
        AttentionMaskInterface._global_mapping.pop("mine_again")
    assert seen == [1, 1, 2, 2]


def test_threads_share_a_model(model):
    """One thread decodes quantized, two dense and one with another preset; each gets the same result as alone."""
    wanted = [{"cache_implementation": name} if name else {} for name in ("kvquant-int4", None, "kvquant-int8", None)]
    alone = [generate(model, families.prompt(seed=i), max_new_tokens=12, **given) for i, given in enumerate(wanted)]
    together: list = [None] * len(wanted)
    barrier = threading.Barrier(len(wanted))

    def run(i: int):
        for _ in range(3):
            barrier.wait()
            together[i] = generate(model, families.prompt(seed=i), max_new_tokens=12, **wanted[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together):
        assert torch.equal(one.sequences, other.sequences)
        assert type(one.past_key_values) is type(other.past_key_values)
    for i in (0, 2):
        assert together[i].past_key_values.routes == alone[i].past_key_values.routes
        assert together[i].past_key_values.routes["decode_fused"] == 2 * 11
    assert not switched(model)


# --- which cache


def test_cache_config_in_every_form(model, tmp_path):
    CONFIG.to_yaml(tmp_path / "mine.yaml")
    expected = generate(model, cache_implementation="kvquant", cache_config=CONFIG)
    assert expected.past_key_values.kv_config == CONFIG
    for given in (str(tmp_path / "mine.yaml"), tmp_path / "mine.yaml", CONFIG.to_dict()):
        out = generate(model, cache_implementation="kvquant", cache_config=given)
        assert type(out.past_key_values) is QuantizedCache
        assert out.past_key_values.kv_config == CONFIG
        assert torch.equal(out.sequences, expected.sequences)
    assert generate(model, cache_implementation="kvquant-fp8").past_key_values.kv_config == KVQuantConfig.preset("fp8")


def test_storage_is_allocated_once_for_the_final_length(model):
    cache = generate(model, cache_implementation="kvquant-int4", max_new_tokens=300).past_key_values
    assert cache.get_seq_length() == 369
    assert cache.layers[0]._keys.capacity == 369
    assert cache.memory_report()["slack"] < cache.memory_report()["total"] / 10


@pytest.mark.parametrize("cache_config", [CONFIG, CONFIG.to_dict()], ids=["object", "dict"])
def test_a_generation_config_survives_json(model, tmp_path, cache_config):
    model.generation_config.cache_implementation = "kvquant"
    model.generation_config.cache_config = cache_config
    before = generate(model)
    model.generation_config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["cache_config"]["sink_length"] == 2
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    after = generate(model)
    assert after.past_key_values.kv_config == before.past_key_values.kv_config == CONFIG
    assert torch.equal(before.sequences, after.sequences)
    model.save_pretrained(tmp_path / "model")
    assert type(model).from_pretrained(tmp_path / "model").generation_config.cache_implementation == "kvquant"
    repr(model.generation_config)


def test_the_choice_may_stand_in_either_generation_config(model):
    given = GenerationConfig(cache_implementation="kvquant-int8", max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        out = model.generate(families.prompt(), generation_config=given, return_dict_in_generate=True)
        assert out.past_key_values.routes["decode_fused"] == 6
        positional = model.generate(families.prompt(), given, return_dict_in_generate=True)
    assert positional.past_key_values.routes["decode_fused"] == 6
    model.generation_config.cache_implementation = "kvquant-int4"
    assert generate(model).past_key_values.routes["decode_fused"] == 14
    assert type(generate(model, cache_implementation="dynamic").past_key_values) is DynamicCache


def test_names_that_cannot_act_raise(model, monkeypatch):
    def refused(match, model=model, **kwargs):
        with pytest.raises(ValueError, match=match):
            generate(model, **kwargs)
        assert not switched(model)

    refused("cache_config: missing", cache_implementation="kvquant")
    refused("cache_config: .* is not allowed with the preset 'kvquant-int4'; expected",
            cache_implementation="kvquant-int4", cache_config=CONFIG)  # fmt: skip
    refused("kvquant-int5", cache_implementation="kvquant-int5")
    refused("needs use_cache=True", cache_implementation="kvquant-int4", use_cache=False)
    refused(
        "cache_config: 'no/such.yaml' is neither a preset nor a file",
        cache_implementation="kvquant",
        cache_config="no/such.yaml",
    )
    refused("keys: missing", cache_implementation="kvquant", cache_config={"values": {"format": "int8"}})
    refused("Passing both", cache_implementation="kvquant-int4", past_key_values=DynamicCache(config=model.config))
    sliding = families.build("mistral", sliding_window=16)
    refused("none of the 2 layers has full attention", sliding, cache_implementation="kvquant-int4")
    mamba = families.build("mamba", attn="eager")
    refused("mamba: none of the 2 layers has full attention", mamba, cache_implementation="kvquant-int4")
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=2))
    refused("OpenAIGPTLMHeadModel does not support Cache objects", gpt, cache_implementation="kvquant-int4")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", lambda self: False)
    refused("LlamaForCausalLM does not support Cache objects", cache_implementation="kvquant-int4")
    monkeypatch.undo()
    odd = families.build("gpt2", n_embd=80, hidden_size=80)
    refused(r"keys\.head_dim: 20 cannot be quantized", odd, cache_implementation="kvquant-int8")


def test_continuous_batching_raises_where_pages_are_other_ones(model, monkeypatch):
    """transformers before 5.23; `test_batching` has the rest."""

    def lacks():
        raise ImportError("transformers has no pages")

    monkeypatch.setattr(host, "continuous_batching", lacks)
    given = GenerationConfig(cache_implementation="kvquant-int4")
    for use in (
        lambda: model.init_continuous_batching(generation_config=given),
        lambda: model.generate_batch([families.prompt()[0].tolist()], generation_config=given),
    ):
        with pytest.raises(ValueError, match="'kvquant-int4' cannot act in continuous batching: .* no pages"):
            use()


# --- several turns


@pytest.mark.parametrize("new_tokens", [20, 60], ids=["short", "long"])
def test_the_route_of_a_second_turn(model, new_tokens):
    cache = QuantizedCache(model.config, "int4")
    first = generate(model, past_key_values=cache)
    assert first.past_key_values is cache
    assert cache.routes["decode_fused"] == 14
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.cat([first.sequences, families.prompt(length=new_tokens, seed=9)], 1)
    second = generate(model, ids, past_key_values=cache)
    hook.remove()
    assert lengths == [new_tokens + 1] + [1] * 7
    assert second.past_key_values is cache
    assert cache.get_seq_length() == 70 + 8 + new_tokens + 7
    assert cache.layers[0]._keys.capacity == cache.get_seq_length()
    assert cache.routes["prefill_dense"] == 2
    is_short = new_tokens + 1 <= 32
    assert cache.routes["decode_fused"] == 14 + 14 + (2 if is_short else 0)
    assert cache.routes["decode_dequantized"] == (0 if is_short else 2)
    assert not switched(model)


def test_a_second_turn_may_bring_padding(model):
    """The rows' left padding of the first turn is still known, and the new mask's columns are appended."""
    cache = QuantizedCache(model.config, "int4")
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    first = generate(model, families.prompt(2), attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones(2, 8 + 5, dtype=torch.long)], 1)
    ids = torch.cat([first.sequences, families.prompt(2, length=5)], 1)
    generate(model, ids, attention_mask=longer, past_key_values=cache)
    expected = torch.zeros(2, 83, dtype=torch.bool)
    expected[0, :9] = True
    assert torch.equal(cache.layers[0].padding, expected)
    assert cache.layers[0].sink_positions.tolist() == [[9, 10, 11, 12], [0, 1, 2, 3]]


# --- assisted generation


def assistant_of(model):
    return families.build("llama", seed=1, num_hidden_layers=1)


class Seen:
    """The caches that a model's forward was called with."""

    def __init__(self, model):
        self.caches = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.caches.append(kwargs.get(host.CACHE)), with_kwargs=True
        )

    @property
    def types(self) -> set[type]:
        return {type(cache) for cache in self.caches}


@pytest.mark.parametrize("assistant_choice", [None, "kvquant-int4"])
@pytest.mark.parametrize("target_choice", [None, "dynamic", "kvquant-int8"])
def test_an_assistant_uses_its_own_choice(model, target_choice, assistant_choice):
    assistant = assistant_of(model)
    assistant.generation_config.cache_implementation = assistant_choice
    seen, target = Seen(assistant), Seen(model)
    given = {"cache_implementation": target_choice, "max_new_tokens": 20}
    out = generate(model, assistant_model=assistant, **given)
    assert target.types == {QuantizedCache if target_choice == "kvquant-int8" else DynamicCache}
    assert seen.types == {QuantizedCache if assistant_choice else DynamicCache}
    # The assistant proposes and the target decides, so the text is the target's own.
    assert torch.equal(out.sequences, generate(model, **given).sequences)
    for cache in (*seen.caches, *target.caches):
        if isinstance(cache, QuantizedCache):
            assert cache.routes["decode_fused"] > 0
            assert cache.routes["decode_dequantized"] == 0
            assert cache.routes["window_lost"] == 0
    assert not switched(model)
    assert not switched(assistant)


def test_an_assistant_does_not_inherit_the_cache_config(model):
    assistant = assistant_of(model)
    assistant.generation_config.cache_implementation = "kvquant-fp8"
    seen = Seen(assistant)
    generate(model, assistant_model=assistant, cache_implementation="kvquant", cache_config=CONFIG)
    assert {cache.kv_config for cache in seen.caches} == {KVQuantConfig.preset("fp8")}


def test_an_assistants_cache_grows_in_few_steps(model):
    """An assistant generates a few tokens at a time; its storage must not move each time."""
    assistant = assistant_of(model)
    assistant.generation_config.cache_implementation = "kvquant-int8-plain"
    capacities = set()
    assistant.register_forward_hook(
        lambda module, args, kwargs, output: capacities.add(output.past_key_values.layers[0]._keys.capacity),
        with_kwargs=True,
    )
    generate(model, assistant_model=assistant, max_new_tokens=120)
    assert len(capacities) <= 4


# --- encoder-decoder models


def test_encoder_decoder_models(model):
    t5 = families.build("t5")
    cache = generate(t5, cache_implementation="kvquant-int4", max_new_tokens=20).past_key_values
    assert type(cache) is EncoderDecoderCache
    assert type(cache.self_attention_cache) is QuantizedCache
    assert type(cache.cross_attention_cache) is DynamicCache
    assert cache.get_seq_length() == 20
    assert cache.self_attention_cache.routes["decode_fused"] == 2 * 19
    keys = cache.self_attention_cache.layers[0].keys
    cache.crop(-7)
    assert cache.get_seq_length() == 13
    assert torch.equal(cache.self_attention_cache.layers[0].keys, keys[:, :, :13])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.self_attention_cache.layers[0].keys.shape[0] == 2
    given = EncoderDecoderCache(QuantizedCache(t5.config, "int4"), DynamicCache(config=t5.config))
    again = generate(t5, past_key_values=given, max_new_tokens=20)
    assert given.self_attention_cache.routes["decode_fused"] == 2 * 19
    assert torch.equal(again.sequences, generate(t5, cache_implementation="kvquant-int4", max_new_tokens=20).sequences)


def test_padding_of_the_decoder_is_the_decoders():
    """The encoder's mask does not apply to the decoder's columns."""
    t5 = families.build("t5")
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, 40:] = 0
    out = generate(t5, families.prompt(2), attention_mask=mask, cache_implementation="kvquant-int4")
    assert out.past_key_values.self_attention_cache.layers[0].padding is None


# --- formats that the kernels of a GPU do not take at every head_dim


class TestFormatsOnAGpu:
    """As if states were on a GPU: refused before anything is computed or stored."""

    @pytest.fixture
    def model(self):
        return families.build("llama", head_dim=96)

    @staticmethod
    @contextmanager
    def chosen(backend: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "choose_backend", lambda *_: backend)
            yield

    def test_generate_refuses_a_late_layer_before_the_prompt(self, model):
        config = KVQuantConfig(
            QuantSpec("int8"), QuantSpec("int4"), layers={1: LayerOverride(values=QuantSpec("int2"))}
        )
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        expected = (
            "layer 1: head_dim: 96 is not supported by the CUDA kernels for values of int2; expected a multiple of 64"
        )
        with self.chosen("cuda"), pytest.raises(ValueError, match=expected):
            generate(model, cache_implementation="kvquant", cache_config=config)
        assert not calls and not switched(model)
        assert generate(model, cache_implementation="kvquant", cache_config=config).sequences.shape[1]

    def test_a_cache_made_by_hand_refuses_its_first_tokens(self, model):
        cache = QuantizedCache(model.config, KVQuantConfig(QuantSpec("int3", "channel"), QuantSpec("int8")))
        states = torch.randn(1, model.config.num_key_value_heads, 5, 96)
        with (
            self.chosen("cuda"),
            pytest.raises(ValueError, match="layer 0: head_dim: 96 is not supported .* for keys of int3"),
        ):
            cache.update(states, states, 0)
        assert not cache.layers[0].is_initialized and not cache.layers[0].storing
        cache.update(states, states, 0)
        assert cache.get_seq_length() == states.shape[2]

    def test_a_multiple_is_taken(self):
        specs = QuantSpec("int3", "channel"), QuantSpec("int2")
        with self.chosen("cuda"):
            ops.check_formats(*specs, "auto", torch.device("cuda"), torch.float32, (192, 64))
            with pytest.raises(ValueError, match="head_dim: 32 is not .* for values of int2"):
                ops.check_formats(*specs, "auto", torch.device("cuda"), torch.float32, (192, 32))
            grouped = QuantSpec("int3", group_size=32)
            with pytest.raises(ValueError, match="group_size: 32 is not .* for keys of int3"):
                ops.check_formats(grouped, specs[1], "auto", torch.device("cuda"), torch.float32, (64, 64))

    def test_the_reference_takes_all(self, model):
        specs = QuantSpec("int3"), QuantSpec("int2")
        with self.chosen("reference"):
            for device in ("cpu", "cuda"):
                ops.check_formats(*specs, "auto", torch.device(device), torch.float32, (96, 96))
        config = KVQuantConfig(*specs, backend="reference")
        assert generate(model, cache_implementation="kvquant", cache_config=config).sequences.shape[1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"head_dim": 24}, (24, 24)),
        ({"hidden_size": 64, "num_attention_heads": 4}, (16, 16)),
        ({"head_dim": None, "hidden_size": 64, "num_attention_heads": 2}, (32, 32)),
        ({"head_dim": 192, "v_head_dim": 128}, (192, 128)),
        ({"head_dim": 64, "kv_lora_rank": 512}, None),
        ({"d_model": 64}, None),
    ],
)
def test_the_head_dims_of_a_config(fields, expected):
    assert host.head_dims(PreTrainedConfig(**fields)) == expected
