"""The columns of a cache: text tokens, image tokens, and windows that hide nothing."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import (
    DynamicCache,
    GitConfig,
    GitForCausalLM,
    StaticCache,
)

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec
from hf_kvquant.attention import attend
from hf_kvquant.cross_attention import CROSS_ATTENTION
from hf_kvquant.host import CACHE, cache_inputs, cache_of

EXACT = KVQuantConfig(QuantSpec("int8"), QuantSpec("int8"), recent_length=4096)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}


def assert_equal_logits(a, b, tolerance: float = 1e-3):
    assert torch.equal(a.sequences, b.sequences)
    difference = (torch.stack(a.logits) - torch.stack(b.logits)).abs().max()
    assert difference < tolerance, float(difference)


class TestImageTokensInFront:
    """GIT puts the tokens of its image before those of the text, and its mask knows nothing of them."""

    def test_padding_and_sinks_are_the_text_s(self):
        torch.manual_seed(0)
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        config = GitConfig(
            vision_config=vision, vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.15, max_position_embeddings=256, bos_token_id=1,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = GitForCausalLM(config).eval()
        model.generation_config.eos_token_id = None
        ids, mask = families.prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[1, :9] = 0
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)} | GREEDY
        config = {"keys": {"format": "int8"}, "values": {"format": "int8"}, "sink_length": 7}
        cache = cache_of(model.generate(**given, cache_implementation="kvquant", cache_config=config))
        layer, image = cache.layers[0], cache.layers[0].length - 40 - 11
        assert image == 5
        assert layer.padding[:, :45].nonzero().tolist() == [[1, image + i] for i in range(9)]
        assert layer.sink_positions.tolist() == [list(range(7)), [*range(5), 14, 15]]
        exact = model.generate(**given, cache_implementation="kvquant", cache_config=EXACT)
        assert_equal_logits(exact, model.generate(**given))


@pytest.fixture(scope="module")
def mllama():
    return families.build("mllama")


def image_and_text() -> dict:
    return {"input_ids": families.prompt(1, 40)} | families.image(1, 40) | GREEDY


class TestCrossAttentionInADecoder:
    """Mllama keeps the keys and values of its images in layers of the same cache as its text."""

    @pytest.mark.parametrize("static", ["", "-static"])
    def test_it_stays_transformers_own(self, mllama, static):
        out = mllama.generate(**image_and_text(), cache_implementation=f"kvquant-int8-plain{static}")
        cache = cache_of(out)
        assert [isinstance(layer, CROSS_ATTENTION) for layer in cache.layers] == [False, True] * 2
        assert cache.layers[1].keys.shape[2] == 4 * 5
        assert cache.routes["decode_fused"] == 11 * 2
        assert cache.routes["decode_dequantized"] == 0
        assert cache.memory_report()["total"] > 2 * cache.layers[1].keys.nbytes

    def test_with_every_token_exact_it_is_the_dense_cache(self, mllama):
        given = image_and_text()
        exact = mllama.generate(**given, cache_implementation="kvquant", cache_config=EXACT)
        assert_equal_logits(exact, mllama.generate(**given))

    @pytest.mark.parametrize("static", ["", "-static"])
    def test_a_rollback_leaves_the_image_alone(self, mllama, static):
        plain = mllama.generate(**image_and_text(), cache_implementation=f"kvquant-int8-plain{static}")
        kept = mllama.generate(
            **image_and_text(), cache_implementation=f"kvquant-int8-plain{static}", prompt_lookup_num_tokens=3
        )
        cache = cache_of(kept)
        assert [cache.layers[i].keys.shape[2] for i in (1, 3)] == [20, 20]
        assert torch.equal(kept.sequences, plain.sequences)

    def test_beams_reorder_it(self, mllama):
        given = image_and_text() | {"num_beams": 3}
        exact = mllama.generate(**given, cache_implementation="kvquant", cache_config=EXACT)
        assert torch.equal(exact.sequences, mllama.generate(**given).sequences)

    @pytest.mark.parametrize("static", ["", "-static"])
    def test_it_is_saved_and_loaded(self, mllama, static, tmp_path):
        cache = cache_of(mllama.generate(**image_and_text(), cache_implementation=f"kvquant-int8{static}"))
        cache.save(tmp_path / "cache.safetensors")
        again = QuantizedCache.load(tmp_path / "cache.safetensors", mllama.config, max_length=100)
        for a, b in zip(cache.layers[1::2], again.layers[1::2]):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


class TestMasks:
    @pytest.mark.parametrize("columns", [39, 41, 64])
    def test_one_that_does_not_fit_is_an_error(self, columns):
        model = families.build("llama")
        cache = QuantizedCache(model.config, "int8")
        with torch.no_grad(), hf_kvquant.attention(model):
            model(families.prompt(1, 39), **cache_inputs(model, cache))
            mask = torch.zeros(1, 1, 1, columns)
            with pytest.raises(ValueError, match=r"mask: shape \(1, 1, 1, \d+\) does not fit"):
                model(families.prompt(1, 1), attention_mask=mask, **cache_inputs(model, cache))

    def test_dense_attention_gets_it_as_it_is(self):
        seen = []

        def dense(module, query, key, value, mask, **kwargs):
            seen.append(mask.shape)

        states = torch.randn(1, 2, 5, 16)
        attend(torch.nn.Module(), states, states, states, torch.zeros(1, 1, 5, 9), dense_attention=dense)
        assert seen == [(1, 1, 5, 9)]


class TestWideWindows:
    """A window that no sequence outgrows is ignored by the cache and by attention."""

    @pytest.mark.parametrize("static", ["", "-static"])
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_one_as_wide_as_the_context(self, attn, static):
        model = families.build("mistral", attn=attn, sliding_window=1024)
        out = model.generate(families.prompt(), **GREEDY, cache_implementation=f"kvquant-int8{static}")
        assert cache_of(out).routes["decode_fused"] == 11 * 2
        exact = model.generate(families.prompt(), **GREEDY, cache_implementation="kvquant", cache_config=EXACT)
        assert_equal_logits(exact, model.generate(families.prompt(), **GREEDY))

    def test_one_that_the_requested_length_does_not_reach(self):
        model = families.build("mistral", sliding_window=100)
        out = model.generate(families.prompt(), **GREEDY, cache_implementation="kvquant-int8")
        assert cache_of(out).routes["decode_fused"] == 11 * 2
        with pytest.raises(ValueError, match="none of the 2 layers has full attention .*DynamicSlidingWindowLayer"):
            model.generate(families.prompt(), **GREEDY | {"max_new_tokens": 32}, cache_implementation="kvquant-int8")

    def test_a_cache_that_outgrows_it_after_all_keeps_the_window(self):
        """The mask hides the same columns as the window."""
        model = families.build("mistral", sliding_window=75)
        ids, caches = families.prompt(1, 100), []
        with torch.no_grad(), hf_kvquant.attention(model):
            for cache in (QuantizedCache(model.config, EXACT, max_length=75), DynamicCache(config=model.config)):
                model(ids[:, :70], **cache_inputs(model, cache))
                steps = [model(ids[:, i : i + 1], **cache_inputs(model, cache)).logits for i in range(70, 100)]
                caches.append((cache, torch.cat(steps, 1)))
        (ours, logits), (_, expected) = caches
        assert len(ours.quantized_layers) == 2
        assert ours.routes["decode_fused"] == 30 * 2
        assert (logits - expected).abs().max() < 1e-3

    def test_narrow_windows_stay_transformers_own(self):
        model = families.build("gemma3")
        cache = QuantizedCache(model.config, "int8")
        assert len(cache.quantized_layers) == 1
        native = StaticCache(model.config, max_cache_len=80).layers
        static = QuantizedCache(model.config, "int8-static", max_length=80).layers
        assert [type(layer) for layer in static[::2]] == [type(layer) for layer in native[::2]]


def test_a_model_that_reads_keys_in_a_step_is_counted():
    """Reading the shape of keys costs nothing; each use of their elements de-quantizes the layer."""
    model, seen = families.build("llama"), []
    attention = model.model.layers[1].self_attn

    def looks_inside(hidden_states, *args, **kwargs):
        layer = kwargs[CACHE].layers[1]
        if layer.is_initialized:
            assert layer.keys.shape == (1, 2, layer.length, 64)
            assert layer.keys.numel() == 2 * layer.length * 64
            if layer.length % 2:
                seen.append(float((layer.keys + 0).abs().max()))
        return type(attention).forward(attention, hidden_states, *args, **kwargs)

    attention.forward = looks_inside
    out = model.generate(families.prompt(), **GREEDY, cache_implementation="kvquant-int8")
    routes = cache_of(out).routes
    assert len(seen) == 5 == routes["decode_dequantized"]
    assert seen[0] > 0
    assert routes["decode_fused"] == 11 * 2
    # Outside of a call, keys are an ordinary tensor.
    assert type(cache_of(out).layers[1].keys) is torch.Tensor
    assert cache_of(out).routes == routes
