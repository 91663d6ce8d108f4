"""Whole models of every family: every decode step is fused, and computes the right result.

There are three references: the de-quantized route through the model's own attention (same bytes, so nearly equal),
each row of a batch alone, and the dense cache (within the format's tolerance).
"""

from __future__ import annotations

import copy
import functools
import warnings

import families
import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import hf_kvquant
from hf_kvquant import QuantizedCache
from hf_kvquant.quantization import unpack

PRESETS = ("int8", "fp8", "int4", "int4-small")
TOKEN_GRIDS = ("int8-plain", "fp8", "int4-small")
# The root-mean-square distance of logits from those of the dense cache, as a share of the logits' own spread.
TOLERANCE = {"int8": 0.03, "int8-plain": 0.03, "fp8": 0.12, "int4": 0.3, "int4-small": 0.45}
# Fused and de-quantized attention differ by rounding only; in half precision it adds up over the layers of a model.
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
STEPS = 10


def bases(name: str) -> list[str]:
    model = getattr(transformers, families.ALL[name].model)
    if name == "gemma2":
        # transformers' sdpa leaves out the softcap; later versions refuse it for this model.
        return ["eager"]
    return ["sdpa", "eager"] if model._supports_sdpa else ["eager"]


every_family = pytest.mark.parametrize("name", families.FAMILIES)
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_family_and_base = pytest.mark.parametrize(
    ("name", "attn"), [(name, attn) for name in families.FAMILIES for attn in bases(name)]
)


@functools.lru_cache(maxsize=None)
def build(name: str, dtype: torch.dtype = torch.float32, attn: str | None = None):
    # transformers' grouped matrix product of experts has no float64.
    has_experts = name in ("gpt_oss", "deepseek_v3")
    options = {"experts_implementation": "eager"} if has_experts and dtype == torch.float64 else {}
    return families.build(name, dtype, attn or bases(name)[0], **options)


def generate(model, ids: torch.Tensor, **kwargs):
    """Greedy generation; T5 gets the prompt as its decoder's, so that its cache has something to read."""
    if model.config.is_encoder_decoder:
        start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        kwargs = {"decoder_input_ids": torch.cat([start, ids[:, 1:]], 1)} | kwargs
        ids = families.prompt(ids.shape[0], 30, seed=3)
    options = {"do_sample": False, "max_new_tokens": STEPS + 1, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(ids, **(options | kwargs))


def own(cache) -> QuantizedCache:
    """The self-attention cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class Runner:
    """Plain forward calls with a given cache, of decoders and of T5 (whose encoder runs once)."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.given = {}
        if model.config.is_encoder_decoder:
            self.given["encoder_outputs"] = model.encoder(families.prompt(1, 30, seed=3))
            if not isinstance(cache, EncoderDecoderCache):
                self.cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        name = "decoder_input_ids" if self.given else "input_ids"
        out = self.model(**{name: ids}, past_key_values=self.cache, use_cache=True, **self.given)
        return out.logits[:, -1].float()


def newest_codes(cache: QuantizedCache) -> list[torch.Tensor]:
    """The stored bytes of the last token on token grids."""
    sides = [side for layer in cache.quantized_layers for side in (layer._keys, layer._values)]
    return [side.data[:, :, cache.get_seq_length() - 1] for side in sides if not side.spec.is_channel]


def distance(logits: torch.Tensor, dense: torch.Tensor) -> float:
    return float((logits - dense).pow(2).mean().sqrt() / dense.std())


# --- the route


@every_family_and_base
@every_preset
def test_every_decode_step_is_fused(name, attn, preset):
    model = build(name, attn=attn)
    out = generate(model, families.prompt(2), cache_implementation=f"kvquant-{preset}")
    cache, layers = own(out.past_key_values), families.FAMILIES[name].num_full
    assert type(cache) is QuantizedCache
    assert len(cache.quantized_layers) == layers
    expected = {"prefill_dense": layers, "decode_fused": layers * STEPS}
    assert {route: count for route, count in cache.routes.items() if count} == expected
    assert cache.get_seq_length() == 70 + STEPS
    # The prompt is attended to densely: the first token's logits are the dense cache's own.
    torch.testing.assert_close(out.logits[0], dense_first_logits(name, attn), rtol=0, atol=1e-5)


@functools.lru_cache(maxsize=None)
def dense_first_logits(name: str, attn: str) -> torch.Tensor:
    return generate(build(name, attn=attn), families.prompt(2), max_new_tokens=1).logits[0]


@every_family_and_base
@every_preset
@torch.no_grad()
def test_fused_equals_dequantized(name, attn, preset):
    """Step by step from the same bytes: the operator, and the model's own attention over a de-quantized copy."""
    model = build(name, attn=attn)
    ids = families.prompt(1, 60 + STEPS)
    fused = Runner(model, QuantizedCache(model.config, preset))
    dense = Runner(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    flips, outputs, references = 0, [], []
    with hf_kvquant.attention(model):
        fused(ids[:, :60])
        dense(ids[:, :60])
        for at in range(60, 60 + STEPS):
            new = ids[:, at : at + 1]
            other = Runner(model, copy.deepcopy(fused.cache))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own(other.cache).disable_fused("it is compared")
            expected, got = other(new), fused(new)
            references.append(dense(new))
            outputs.append(got)
            # An element between two codes may round to either; such a step cannot be compared.
            if all(torch.equal(a, b) for a, b in zip(newest_codes(own(fused.cache)), newest_codes(own(other.cache)))):
                torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING[torch.float32])
            else:
                flips += 1
    layers = families.FAMILIES[name].num_full
    assert own(fused.cache).routes["decode_fused"] == layers * STEPS
    assert own(other.cache).routes["decode_dequantized"] == layers
    assert flips <= 2
    assert distance(torch.stack(outputs), torch.stack(references)) <= TOLERANCE[preset]


@every_family
@torch.no_grad()
def test_a_verify_equals_single_steps(name):
    """Twenty tokens at once, as speculative decoding feeds them, through the whole model in float64."""
    model = build(name, torch.float64)
    ids = families.prompt(1, 80)
    with hf_kvquant.attention(model):
        at_once = Runner(model, QuantizedCache(model.config, "int4"))
        at_once(ids[:, :60])
        steps = Runner(model, copy.deepcopy(at_once.cache))
        got = at_once(ids[:, 60:])
        for at in range(60, 80):
            expected = steps(ids[:, at : at + 1])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert own(at_once.cache).routes["decode_fused"] == families.FAMILIES[name].num_full


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("preset", ["int8", "int4"])
@torch.no_grad()
def test_half_precision(name, dtype, preset):
    model = build(name, dtype)
    ids = families.prompt(1, 70)
    out = generate(model, ids, cache_implementation=f"kvquant-{preset}")
    cache, layers = own(out.past_key_values), families.FAMILIES[name].num_full
    assert all(layer.dtype == dtype for layer in cache.quantized_layers)
    assert {r: n for r, n in cache.routes.items() if n} == {"prefill_dense": layers, "decode_fused": layers * STEPS}
    fused = Runner(model, QuantizedCache(model.config, preset))
    with hf_kvquant.attention(model):
        fused(ids[:, :69])
        other = Runner(model, copy.deepcopy(fused.cache))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own(other.cache).disable_fused("it is compared")
        got, expected = fused(ids[:, 69:]), other(ids[:, 69:])
    torch.testing.assert_close(got, expected, rtol=0.02, atol=ROUNDING[dtype])


# --- batches


def padded(name: str, lengths=(70, 43, 66)) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their mask."""
    ids = families.prompt(len(lengths), max(lengths), seed=11)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


DECODERS = [name for name in families.FAMILIES if name != "t5"]


def rows_alone(model, ids, mask, cache_implementation: str, forced: torch.Tensor):
    """Logits of each row generated alone while it is made to say `forced`, and the caches."""
    logits, caches = [], []
    for row in range(ids.shape[0]):
        out = generate(
            model, ids[row : row + 1, mask[row] != 0], cache_implementation=cache_implementation,
            logits_processor=[families.Say(forced[row : row + 1])],
        )  # fmt: skip
        logits.append(torch.stack(out.logits, 1))
        caches.append(out.past_key_values)
    return torch.cat(logits), caches


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("preset", TOKEN_GRIDS)
def test_left_padding_changes_nothing(name, preset):
    """Token grids: a row's bytes do not depend on its neighbours."""
    # They have eager attention only, which makes NaN of padded rows in float64, with a dense cache too.
    dtype, tolerance = (torch.float32, 5e-3) if name in ("gemma2", "bloom") else (torch.float64, 1e-5)
    model = build(name, dtype)
    ids, mask = padded(name)
    forced = families.prompt(3, STEPS + 1, seed=12)
    choice = {"cache_implementation": f"kvquant-{preset}"}
    batch = generate(model, ids, attention_mask=mask, logits_processor=[families.Say(forced)], **choice)
    alone, _ = rows_alone(model, ids, mask, forced=forced, **choice)
    torch.testing.assert_close(torch.stack(batch.logits, 1), alone, rtol=0, atol=tolerance)
    assert batch.past_key_values.routes["decode_fused"] == families.FAMILIES[name].num_full * STEPS


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_left_padding_moves_blocks(name, preset):
    """Channel grids: padding moves the borders of blocks, so rows agree within the format's tolerance."""
    model = build(name)
    ids, mask = padded(name)
    forced = families.prompt(3, STEPS + 1, seed=12)
    choice = {"cache_implementation": f"kvquant-{preset}"}
    batch = generate(model, ids, attention_mask=mask, logits_processor=[families.Say(forced)], **choice)
    alone, _ = rows_alone(model, ids, mask, forced=forced, **choice)
    assert distance(torch.stack(batch.logits, 1), alone) <= TOLERANCE[preset]
    for layer in batch.past_key_values.quantized_layers:
        assert torch.equal(layer.padding, mask == 0)
    # The first row has no padding, so its bytes are the same.
    torch.testing.assert_close(torch.stack(batch.logits, 1)[0], alone[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("preset", TOKEN_GRIDS)
def test_left_padding_flips_few_codes(name, preset):
    """In float32 a product's rounding depends on the batch: a code in a thousand may move, by one step."""
    model = build(name)
    ids, mask = padded(name)
    forced = families.prompt(3, STEPS + 1, seed=12)
    choice = {"cache_implementation": f"kvquant-{preset}"}
    batch = generate(
        model, ids, attention_mask=mask, logits_processor=[families.Say(forced)], **choice
    ).past_key_values
    _, alone = rows_alone(model, ids, mask, forced=forced, **choice)
    moved, total, largest = 0, 0, 0.0
    for row, cache in enumerate(alone):
        length = cache.get_seq_length()
        for layer, single in zip(batch.layers, cache.layers):
            for side, other in ((layer._keys, single._keys), (layer._values, single._values)):
                a = side.data[row, :, 70 + STEPS - length : 70 + STEPS]
                b = other.data[0, :, :length]
                total += a.numel() * 8 // (4 if "int4" in preset else 8)
                if "int4" in preset or "int8" in preset:
                    steps = (unpack(a, side.spec, side.head_dim) - unpack(b, side.spec, side.head_dim)).abs()
                else:
                    # e4m3 bytes without their sign are in the order of their values.
                    steps = ((a & 127).int() - (b & 127).int()).abs()
                moved += int((steps > 0).sum())
                largest = max(largest, float(steps.max()))
    assert moved <= total / 1000
    assert largest <= 1


def test_a_sliding_model_raises():
    model = families.build("mistral", sliding_window=64)
    with pytest.raises(ValueError, match=r"mistral: none of the 2 layers has full attention .*nothing to quantize"):
        generate(model, families.prompt(), cache_implementation="kvquant-int8")
