"""Keys, values and queries of different dtypes, as autocast leaves them: stored and read as attention casts them."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import DynamicCache

import hf_kvquant
from hf_kvquant import KVQuantConfig, QuantizedCache, QuantSpec, score, score_by_decoding
from hf_kvquant.host import cache_inputs, cache_of

EXACT = KVQuantConfig(QuantSpec("int8"), QuantSpec("int8"), recent_length=4096)
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


# The rounding of bfloat16 logits, as a share of their spread; one wrong cached token moves them by all of it.
ROUNDING = 0.02


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).float().abs().mean() / b.float().std())


def generate(model, **kwargs):
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(families.prompt(2), **options, **kwargs)


@pytest.mark.parametrize("static", ["", "-static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5", "bart"])
def test_autocast_over_a_float32_model(name, static):
    """Rotary embedding leaves float32 keys beside bfloat16 values."""
    model = families.build(name)
    with torch.autocast(**AUTOCAST):
        dense = generate(model)
        exact = generate(model, cache_implementation="kvquant", cache_config=EXACT)
        out = generate(model, cache_implementation=f"kvquant-int8{static}")
    cache = cache_of(out)
    cache = getattr(cache, "self_attention_cache", cache)
    assert cache.routes["decode_fused"] == 11 * 2
    assert cache.routes["decode_dequantized"] == 0
    assert {layer.dtype for layer in cache.layers} == {torch.bfloat16}
    assert far(torch.stack(exact.logits[:3]), torch.stack(dense.logits[:3])) < ROUNDING
    assert far(torch.stack(out.logits[:3]), torch.stack(dense.logits[:3])) < 3 * ROUNDING
    assert torch.equal(exact.sequences, dense.sequences)


def test_a_cache_that_was_filled_without_it_goes_on_under_it():
    model, ids = families.build("llama"), families.prompt(2, 60)
    cache, dense = QuantizedCache(model.config, EXACT), DynamicCache(config=model.config)
    with torch.no_grad(), hf_kvquant.attention(model):
        for c in (cache, dense):
            model(ids[:, :50], **cache_inputs(model, c))
        with torch.autocast(**AUTOCAST):
            for i in range(50, 60):
                ours, theirs = (model(ids[:, i : i + 1], **cache_inputs(model, c)).logits for c in (cache, dense))
                assert ours.dtype == theirs.dtype
                assert far(ours, theirs) < ROUNDING
    assert {layer.dtype for layer in cache.layers} == {torch.float32}
    assert cache.routes["decode_fused"] == 10 * 2


def test_scoring_under_autocast_is_decoding_under_autocast():
    model, ids = families.build("llama"), families.prompt(1, 90)
    with torch.autocast(**AUTOCAST):
        parallel = score(model, ids, 40, "int8").float()
        decoded = score_by_decoding(model, ids, 40, "int8").float()
    assert far(parallel, decoded) < ROUNDING


def test_other_differences_are_an_error():
    """Without autocast dense attention refuses them as well."""
    cache = QuantizedCache(families.config("llama"), "int8")
    with pytest.raises(ValueError, match=r"value_states: .* of torch.bfloat16 does not fit layer 0; .*torch.float32"):
        cache.update(torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64).bfloat16(), 0)


# torch's product of grouped experts takes no float64 with gradients.
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("llama", torch.float32, 1e-4), ("llama", torch.float64, 1e-9), ("deepseek_v3", torch.float32, 1e-4)],
)
def test_what_grad_mode_changes_is_rounding(name, dtype, tolerance):
    """Queries that require grad read de-quantized states through the model's own attention."""
    model, ids, logits = families.build(name, dtype=dtype), families.prompt(1, 71), []
    for grad in (False, True):
        cache = QuantizedCache(model.config, "int4")
        with hf_kvquant.attention(model):
            with torch.no_grad():
                model(ids[:, :70], **cache_inputs(model, cache))
            with torch.set_grad_enabled(grad):
                logits.append(model(ids[:, 70:], **cache_inputs(model, cache)).logits.detach())
        assert cache.routes["decode_dequantized"] == 2 * grad
    assert (logits[0] - logits[1]).abs().max() < tolerance
