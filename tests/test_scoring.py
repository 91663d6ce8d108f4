"""Decode-faithful scoring equals real decode: the licence of every accuracy figure."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GptOssConfig, LlamaConfig

from hf_kvquant import KVQuantConfig, QuantSpec, cache_read_share, score, score_by_decoding

LENGTH, CONTEXT = 100, 58
# float64: the quantized inputs of both ways agree to rounding, so codes do, and logits agree to accumulated rounding.
FLOAT64_TOLERANCE = 1e-5

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 97}
FAMILIES = {
    "llama-gqa": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=64),
    "gpt2-mha": GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0),
    "gemma3-hybrid": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 3}, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, sliding_window=16, layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "gpt-oss-sinks": GptOssConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=32, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention", "full_attention"],
    ),
}  # fmt: skip


def spec(format, **fields):
    return QuantSpec(format, **fields)


CONFIGS = {
    "int8-token": KVQuantConfig(spec("int8"), spec("int8")),
    "fp8-token": KVQuantConfig(spec("fp8", group_size=16), spec("fp8")),
    "int4-rotated": KVQuantConfig(spec("int4", rotate=True), spec("int4", group_size=16, rotate=True)),
    "int4-channel": KVQuantConfig(spec("int4", grid="channel", block_length=16), spec("int4", rotate=True), 3, 9),
    "int8-channel": KVQuantConfig(spec("int8", grid="channel"), spec("int8"), recent_length=70),
    "fp8-channel": KVQuantConfig(spec("fp8", grid="channel", block_length=32), spec("int4"), sink_length=5),
    "dense-values": KVQuantConfig(spec("int4", grid="channel"), spec("dense"), 2, 4),
    "dense-keys": KVQuantConfig(spec("dense"), spec("int4", rotate=True), 2, 4),
}


def tiny(family: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    # The grouped matrix product of experts does not know float64.
    options = {"experts_implementation": "eager"} if family.startswith("gpt-oss") else {}
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text(padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (3, LENGTH))
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :11] = 0
    mask[2, :50] = 0
    return (ids, mask) if padded else (ids[:1], None)


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "left-padded"])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_score_equals_decode_in_float64(config, padded):
    model = tiny("llama-gqa", torch.float64)
    ids, mask = text(padded)
    scored = score(model, ids, CONTEXT, CONFIGS[config], attention_mask=mask)
    decoded = score_by_decoding(model, ids, CONTEXT, CONFIGS[config], attention_mask=mask)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(scored[seen], decoded[seen], rtol=0, atol=FLOAT64_TOLERANCE)
    dense = score(model, ids, CONTEXT, "none", attention_mask=mask)
    after = torch.arange(LENGTH) >= CONTEXT
    assert (scored - dense)[:, after].abs().max() > 100 * FLOAT64_TOLERANCE, "the cache was not read"
    torch.testing.assert_close(
        scored[:, ~after][seen[:, ~after]], dense[:, ~after][seen[:, ~after]], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-gqa"])
@pytest.mark.parametrize("config", ["int4-rotated", "int4-channel"])
@torch.no_grad()
def test_score_equals_decode_for_families(family, config):
    model = tiny(family, torch.float64)
    ids, _ = text(padded=False)
    scored = score(model, ids, CONTEXT, CONFIGS[config])
    decoded = score_by_decoding(model, ids, CONTEXT, CONFIGS[config])
    torch.testing.assert_close(scored, decoded, rtol=0, atol=FLOAT64_TOLERANCE)


@torch.no_grad()
def test_chunked_decode_equals_single_steps():
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=False)
    single = score_by_decoding(model, ids, CONTEXT, CONFIGS["int4-channel"])
    for chunk in (3, 16, 32):
        many = score_by_decoding(model, ids, CONTEXT, CONFIGS["int4-channel"], chunk=chunk)
        torch.testing.assert_close(many, single, rtol=0, atol=FLOAT64_TOLERANCE)


@torch.no_grad()
def test_context_lengths_per_row():
    model = tiny("llama-gqa", torch.float64)
    ids, _ = text(padded=True)
    scored = score(model, ids, [40, 64, 90], CONFIGS["int4-channel"])
    for row, context in enumerate((40, 64, 90)):
        alone = score(model, ids[row : row + 1], context, CONFIGS["int4-channel"])
        torch.testing.assert_close(scored[row : row + 1], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_float32_agrees_up_to_flipped_codes():
    """In float32 the two ways may round a number to either side of a step; that may happen to few codes only, so that
    nearly all logits agree closely and the mean divergence is far below the format's own."""
    model = tiny("llama-gqa", torch.float32)
    ids, _ = text(padded=False)
    config = CONFIGS["int4-channel"]
    scored, decoded, dense = (
        score(model, ids, CONTEXT, config),
        score_by_decoding(model, ids, CONTEXT, config),
        score(model, ids, CONTEXT, "none"),
    )
    rows = slice(CONTEXT, None)
    between, lossy = (scored - decoded)[:, rows].abs().mean(), (scored - dense)[:, rows].abs().mean()
    assert between < 0.02 * lossy


def test_scoring_needs_no_gradients():
    """Called as the README shows it, outside torch.no_grad, on parameters that require gradients."""
    model = tiny("llama-gqa", torch.float32)
    assert next(model.parameters()).requires_grad
    assert not score(model, text(padded=False)[0], CONTEXT, "int8").requires_grad


def test_context_length_out_of_range_is_refused():
    model = tiny("llama-gqa", torch.float32)
    for context in (0, LENGTH + 1):
        with pytest.raises(ValueError, match=r"context_lengths: .*expected 1 to 100"):
            score(model, text(padded=False)[0], context, "int8")


@torch.no_grad()
def test_a_model_that_changes_states_is_refused():
    from transformers import FalconConfig

    config = FalconConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises((ValueError, AttributeError), match="score_by_decoding"):
        score(model, text(padded=False)[0], CONTEXT, "int8")


def test_cache_read_share():
    # Row c reads the cache first; it predicts token c + 1. Token c itself is predicted by prefill.
    assert cache_read_share([10], [10], [11]) == 0.0
    assert cache_read_share([10], [10], [12]) == 0.5
    assert cache_read_share([10, 10], [11, 10], [21, 11]) == 10 / 11
    assert cache_read_share([10], [12], [20]) == 1.0
