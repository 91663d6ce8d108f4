"""The features that must work with every supported release of transformers: import, generate, routes, saving, scoring.

`make smoke` runs this file on releases between the oldest and the newest, which have larger suites of their own.
"""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvquant
from hf_kvquant import QuantizedCache

LAYERS, PROMPT, NEW = 2, 70, 20
PRESETS = ["int8", "fp8", "int4"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=None,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(61, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def generate(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int, **options):
    mask = torch.ones_like(ids)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def test_the_release_is_the_one_that_was_asked_for():
    assert transformers.__version__ == os.environ.get("SMOKE_TRANSFORMERS", transformers.__version__)
    assert {f"kvquant-{preset}" for preset in PRESETS} <= set(hf_kvquant.cache_implementations())


@pytest.mark.parametrize("preset", PRESETS)
def test_generate(model, prompt, preset):
    dense = generate(model, prompt, NEW)
    out = generate(model, prompt, NEW, cache_implementation=f"kvquant-{preset}")
    cache = out.past_key_values
    assert isinstance(cache, QuantizedCache)
    assert cache.routes["prefill_dense"] == LAYERS
    assert cache.routes["decode_fused"] == LAYERS * (NEW - 1)
    assert cache.routes["decode_dequantized"] == 0
    # Prefill is exact; the first decode step reads the quantized cache, and is close to the dense one but not equal.
    assert torch.equal(out.logits[0], dense.logits[0])
    assert torch.equal(out.sequences[:, : PROMPT + 1], dense.sequences[:, : PROMPT + 1])
    difference = (out.logits[1] - dense.logits[1]).abs().max() / dense.logits[1].abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_save_load_and_go_on(model, prompt, preset, tmp_path):
    whole = generate(model, prompt, NEW, cache_implementation=f"kvquant-{preset}")
    half = generate(model, prompt, NEW // 2, cache_implementation=f"kvquant-{preset}")
    half.past_key_values.save(tmp_path / "cache.safetensors", model)
    loaded = QuantizedCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.memory_report() == half.past_key_values.memory_report()
    rest = generate(model, half.sequences, NEW - NEW // 2, past_key_values=loaded)
    assert torch.equal(rest.sequences, whole.sequences)


@pytest.mark.parametrize("preset", PRESETS)
def test_score_is_decode(model, prompt, preset):
    out = generate(model, prompt, NEW, cache_implementation=f"kvquant-{preset}")
    with torch.no_grad():
        scored = hf_kvquant.score(model, out.sequences, PROMPT, preset)
    # One row per token that was fed: the last token was generated, and never fed.
    decoded = torch.stack(out.logits, 1)
    torch.testing.assert_close(scored[:, PROMPT - 1 : -1], decoded, rtol=1e-3, atol=1e-3)
