"""A call of `generate` with a quantized cache has it in every forward call, filled, or raises an error.

Code that is not ours comes between `generate` and the layers: `prepare_inputs_for_generation`, adapters that replace
it, logits processors, wrappers of layers. Each test is one way in which they lose, swap or ignore a cache.
"""

from __future__ import annotations

import families
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec
from hf_kvquant.host import CACHE, cache_inputs, cache_of

GREEDY = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
# Every token is exact, so a difference from the dense cache is not due to quantization.
EXACT = KVQuantConfig(QuantSpec("int8"), QuantSpec("int8"), recent_length=4096)


def generate(model, ids=None, **kwargs):
    return model.generate(families.prompt() if ids is None else ids, **(GREEDY | kwargs))


def exactly(model, ids=None, **kwargs):
    return generate(model, ids, cache_implementation="kvquant", cache_config=EXACT, **kwargs)


def assert_equal_logits(a, b, tolerance: float = 1e-4):
    assert torch.equal(a.sequences, b.sequences)
    difference = (torch.stack(a.logits) - torch.stack(b.logits)).abs().max()
    assert difference < tolerance, float(difference)


def changed(change):
    """A model whose `prepare_inputs_for_generation` passes its result through `change`."""
    model = families.build("llama")
    prepare = model.prepare_inputs_for_generation

    def changed_inputs(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return change(inputs) or inputs

    model.prepare_inputs_for_generation = changed_inputs
    return model


class TestPrepareInputs:
    def test_dropping_the_cache_of_one_step_raises(self):
        model = changed(lambda inputs: inputs.pop(CACHE) and None if inputs["input_ids"].shape[1] == 1 else None)
        with pytest.raises(RuntimeError, match=r"1 tokens and without the quantized cache, which holds the 70 before"):
            generate(model, cache_implementation="kvquant-int8")

    def test_swapping_it_raises(self):
        def swap(inputs):
            if inputs["input_ids"].shape[1] == 1:
                inputs[CACHE] = DynamicCache()

        with pytest.raises(RuntimeError, match="called with a DynamicCache instead of the quantized cache"):
            generate(changed(swap), cache_implementation="kvquant-int8")

    def test_dropping_it_before_the_first_step_gives_it_back(self):
        """Longrope models do this with a long prompt: the call has all tokens, and loses nothing."""
        model = changed(lambda inputs: inputs.pop(CACHE) and None if inputs["input_ids"].shape[1] > 1 else None)
        out = generate(model, cache_implementation="kvquant-int8")
        assert cache_of(out).routes["decode_fused"] == 7 * 2
        assert_equal_logits(out, generate(families.build("llama"), cache_implementation="kvquant-int8"))

    def test_a_prefix_is_taken_over(self):
        """Prefix tuning does this: the first call has a dense cache that holds the prefix."""
        plain = families.build("llama")
        prefix, mask = families.prompt(2, 13, seed=5), torch.ones(2, 70, dtype=torch.long)
        mask[1, :9] = 0

        def bring(inputs):
            if inputs["input_ids"].shape[1] > 1:
                inputs[CACHE] = DynamicCache(config=plain.config)
                plain(prefix, **{CACHE: inputs[CACHE]})
            length = int(inputs[CACHE].get_seq_length()) + inputs["input_ids"].shape[1]
            inputs["attention_mask"] = torch.cat(
                [torch.ones(2, 13, dtype=torch.long), mask, torch.ones(2, length - 83, dtype=torch.long)], 1
            )
            inputs.pop("position_ids", None)

        model, ids = changed(bring), families.prompt(2)
        # There is padding between prefix and prompt; the first 2 tokens of the prefix are sinks in both rows.
        config = {"keys": {"format": "int4"}, "values": {"format": "int4"}, "sink_length": 2}
        out = generate(model, ids, attention_mask=mask, cache_implementation="kvquant", cache_config=config)
        cache = cache_of(out)
        assert type(cache) is QuantizedCache
        assert cache.get_seq_length() == 13 + 70 + 7
        assert cache.routes["decode_fused"] == 7 * 2
        assert cache.layers[0].sink_positions.tolist() == [[0, 1]] * 2
        assert cache.layers[0].padding[:, :83].sum(1).tolist() == [0, 9]
        assert_equal_logits(exactly(model, ids, attention_mask=mask), generate(model, ids, attention_mask=mask))

    def test_without_our_names_nothing_is_looked_at(self):
        model = changed(lambda inputs: inputs.pop(CACHE) and None if inputs["input_ids"].shape[1] == 1 else None)
        generate(model)


class TestLayers:
    @pytest.mark.parametrize("static", ["", "-static"])
    @pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["one", "all"])
    def test_a_layer_that_ignores_the_cache_raises(self, layers, static):
        model = families.build("llama")
        for i in layers:
            forward = model.model.layers[i].self_attn.forward
            model.model.layers[i].self_attn.forward = lambda *a, forward=forward, **k: forward(*a, **k | {CACHE: None})
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM did not fill the quantized cache: .* \{0: \d+, 1: 0\}"
        ):
            generate(model, cache_implementation=f"kvquant-int8{static}")

    def test_gradient_checkpointing_in_training_mode(self):
        """Up to transformers 5.23 gradient checkpointing calls layers without a cache."""
        model = families.build("llama").train()
        model.gradient_checkpointing_enable()
        expected = generate(families.build("llama"), cache_implementation="kvquant-int8")
        if CACHE == "cache":
            assert_equal_logits(generate(model, cache_implementation="kvquant-int8"), expected)
            return
        with pytest.raises(ValueError, match=r"gradient checkpointing .* call model.eval\(\) before generate"):
            generate(model, cache_implementation="kvquant-int8")


def longrope():
    """A model that scales positions differently once a sequence is longer than 62 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    rope["original_max_position_embeddings"] = 62
    return families.build("longrope", rope_parameters=rope, original_max_position_embeddings=62)


@pytest.mark.parametrize("static", ["", "-static"])
@pytest.mark.parametrize("length", [50, 58, 62, 63, 90])
def test_longrope_models_fill_it_again(length, static):
    model, ids = longrope(), families.prompt(1, length)
    if families.LONGROPE_LOSES_TOKENS and length <= 62 < length + 7:
        with pytest.raises(RuntimeError, match="1 tokens and without the quantized cache, which holds the 62 before"):
            generate(model, ids, cache_implementation=f"kvquant-int8-plain{static}")
        return
    out = generate(model, ids, cache_implementation=f"kvquant-int8-plain{static}")
    cache = cache_of(out)
    assert type(cache) is QuantizedCache
    assert cache.get_seq_length() == length + 7
    prefills = 1 + (length <= 62 < length + 7)
    assert cache.routes["prefill_dense"] == prefills * 2
    assert cache.routes["decode_fused"] == (8 - prefills) * 2
    assert_equal_logits(exactly(model, ids), generate(model, ids))


@pytest.mark.parametrize("static", ["", "-static"])
def test_guidance_keeps_a_quantized_cache_too(static):
    model = families.build("llama")
    options = {"guidance_scale": 1.5, "negative_prompt_ids": families.prompt(1, 40, seed=3)}
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :6] = 0
    options["negative_prompt_attention_mask"] = mask
    out = generate(model, cache_implementation=f"kvquant-int8-plain{static}", **options)
    cache = cache_of(out)
    assert cache.unconditional.routes["decode_fused"] == 7 * 2
    assert cache.unconditional.layers[0].padding.sum() == 6
    assert cache.routes["decode_fused"] == 2 * 7 * 2
    alone = generate(model, cache_implementation=f"kvquant-int8-plain{static}")
    extra = cache.unconditional.memory_report()
    assert cache.memory_report() == {k: n + extra[k] for k, n in cache_of(alone).memory_report().items()}
    assert_equal_logits(exactly(model, **options), generate(model, **options))


class TestSoftPrompts:
    """PEFT's prompt and prefix tuning: virtual tokens come before the padding of the prompt."""

    @pytest.fixture(params=["PromptTuningConfig", "PrefixTuningConfig"])
    def model(self, request):
        peft = pytest.importorskip("peft")
        config = getattr(peft, request.param)(task_type="CAUSAL_LM", num_virtual_tokens=13)
        return peft.get_peft_model(families.build("llama"), config).eval()

    @pytest.mark.parametrize("preset", ["int8", "int4"])
    def test_they_are_stored_or_refused(self, model, preset):
        """PEFT 0.21 does not know the cache of transformers 5.24, and the dense cache holds wrong tokens, too."""
        ids, mask = families.prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[1, :9] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
        dense = model.generate(**inputs)
        if cache_of(dense).get_seq_length() != 13 + 40 + 7:
            given = QuantizedCache(model.config, preset)
            for asked in ({"cache_implementation": f"kvquant-{preset}"}, {CACHE: given}):
                with pytest.raises(ValueError, match=f"^{next(iter(asked))}: .* cannot act: this release of PEFT"):
                    model.generate(**inputs, **asked)
            model.generate(**inputs, use_cache=False)
            return
        out = model.generate(**inputs, cache_implementation=f"kvquant-{preset}")
        layer = cache_of(out).layers[0]
        assert layer.length == 13 + 40 + 7
        assert out.logits[0].sub(dense.logits[0]).abs().max() < 0.05
        assert layer.padding[1, 13:22].all()
        assert not layer.padding[:, :13].any()

    def test_an_encoder_takes_them_before_generation(self):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=13)
        model = peft.get_peft_model(families.build("t5"), config).eval()
        inputs = {"input_ids": families.prompt(1, 20), **GREEDY}
        out = model.generate(**inputs, cache_implementation="kvquant", cache_config=EXACT)
        assert cache_of(out).self_attention_cache.routes["decode_fused"] > 0
        assert_equal_logits(out, model.generate(**inputs))


class TestChoice:
    """A name that was saved with the model is a default; a name in the call is a demand."""

    def test_the_call_outweighs_a_saved_name(self):
        model = families.build("llama")
        model.generation_config.cache_implementation = "kvquant-int8"
        assert cache_of(generate(model, use_cache=False)) is None
        assert type(cache_of(generate(model))) is QuantizedCache

    @pytest.mark.parametrize("how", ["argument", "config"])
    def test_both_in_the_call_raise(self, how):
        model = families.build("llama")
        given = {"cache_implementation": "kvquant-int8", "use_cache": False}
        if how == "config":
            given = {"generation_config": GenerationConfig(**GREEDY, **given)}
        with pytest.raises(ValueError, match="'kvquant-int8' needs use_cache=True"):
            generate(model, **given)


class TestCallsAside:
    """A processor or criterion may call the model itself; the generation's cache stays untouched."""

    @pytest.mark.parametrize("own_cache", [False, True])
    @pytest.mark.parametrize("kind", ["processor", "criterion"])
    def test_they_are_no_steps(self, kind, own_cache):
        model, seen = families.build("llama"), []

        def look(input_ids, scores, **kwargs):
            given = {CACHE: DynamicCache(config=model.config), "use_cache": True} if own_cache else {}
            seen.append(type(cache_of(model(input_ids, **given))))
            return scores if kind == "processor" else torch.zeros(len(input_ids), dtype=torch.bool)

        aside = {"logits_processor": [look]} if kind == "processor" else {"stopping_criteria": [look]}
        out = generate(model, cache_implementation="kvquant-int8", **aside)
        assert seen == [DynamicCache] * 8
        assert cache_of(out).get_seq_length() == 70 + 7
        assert cache_of(out).routes["prefill_dense"] == 2
        assert_equal_logits(out, generate(model, cache_implementation="kvquant-int8"))


class TestSwitchedAdapters:
    """A cache whose first tokens another adapter computed goes on, and says so once."""

    @pytest.fixture
    def model(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(families.build("llama"), config, adapter_name="first").eval()
        model.add_adapter("second", config)
        return model

    def turn(self, model, before=None):
        given = {} if before is None else {CACHE: cache_of(before)}
        ids = families.prompt() if before is None else before.sequences
        name = {"cache_implementation": "kvquant-int8"} if before is None else {}
        return model.generate(input_ids=ids, **GREEDY, **given, **name)

    def test_warn(self, model):
        first = self.turn(model)
        model.set_adapter("second")
        with pytest.warns(UserWarning, match="other adapters .* has 'first' times 2.0 in the cache, 'second' times 2"):
            second = self.turn(model, first)
        assert cache_of(second).routes["decode_fused"] == cache_of(second).routes["prefill_dense"] * (7 + 8)

    @pytest.mark.filterwarnings("error:The tokens in the quantized:UserWarning")
    def test_the_same_one_does_not(self, model):
        self.turn(model, self.turn(model, self.turn(model)))
        model.set_adapter("second")
        self.turn(model)

    def test_plain_calls_warn(self, model):
        cache, base = cache_of(self.turn(model)), model.get_base_model()
        noted = pytest.warns(UserWarning, match="'first' times 2.0 in the cache, none in the model")
        with noted, torch.no_grad(), model.disable_adapter(), hf_kvquant.attention(base):
            base(families.prompt(1, 1), **cache_inputs(base, cache))
