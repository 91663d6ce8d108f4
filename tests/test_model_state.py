"""The state that a model keeps outside of its cache goes with the cache: to a file, and back to the model."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import hf_kvquant
from hf_kvquant import QuantizedCache
from hf_kvquant.host import CACHE, cache_inputs, cache_of

GREEDY = {"do_sample": False, "return_dict_in_generate": True}
IMAGE, START, END = 90, 92, 93


def build() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {k: v for k, v in families.COMMON.items() if k != "head_dim"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 1, "patch_size": 8}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def image_and_text() -> dict:
    """The image takes 16 tokens and moves the text behind it by 4 positions: 12 fewer than tokens."""
    words = families.prompt(1, 22) % 80 + 5
    ids = torch.cat([words[:, :10], torch.tensor([[START, *[IMAGE] * 16, END]]), words[:, 10:]], 1)
    pixels = torch.randn(64, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 8, 8]])
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.fixture
def model():
    return build()


@pytest.fixture
def expected(model) -> torch.Tensor:
    """The tokens of one uninterrupted generation, `[1, length]`."""
    out = model.generate(**image_and_text(), max_new_tokens=18, cache_implementation="kvquant-int8-plain", **GREEDY)
    assert model.model.rope_deltas.tolist() == [[-12]]
    return out.sequences


def first_part(model) -> tuple[torch.Tensor, QuantizedCache]:
    out = model.generate(**image_and_text(), max_new_tokens=6, cache_implementation="kvquant-int8-plain", **GREEDY)
    return out.sequences, cache_of(out)


def go_on(model, sequences: torch.Tensor, cache: QuantizedCache) -> torch.Tensor:
    return model.generate(sequences, max_new_tokens=12, **{CACHE: cache}, **GREEDY).sequences


def test_a_live_cache_after_another_request(model, expected):
    sequences, cache = first_part(model)
    model.generate(families.prompt(1, 30) % 80 + 5, max_new_tokens=3, **GREEDY)
    assert model.model.rope_deltas.tolist() == [[0]]
    assert torch.equal(go_on(model, sequences, cache), expected)


def test_a_copied_cache(model, expected):
    sequences, cache = first_part(model)
    kept = copy.deepcopy(cache)
    model.model.rope_deltas = None
    assert torch.equal(go_on(model, sequences, kept), expected)


def test_plain_calls(model, expected):
    sequences, cache = first_part(model)
    model.model.rope_deltas = torch.zeros(1, 1, dtype=torch.long)
    token, tokens = sequences[:, -1:], []
    with torch.no_grad(), hf_kvquant.attention(model):
        for _ in range(12):
            token = model(token, **cache_inputs(model, cache)).logits[:, -1:].argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat([sequences, *tokens], 1), expected)


def test_a_saved_cache_in_a_model_that_was_just_loaded(model, expected, tmp_path):
    sequences, cache = first_part(model)
    cache.save(tmp_path / "cache.safetensors", model)
    other = build()
    assert other.model.rope_deltas is None
    loaded = QuantizedCache.load(tmp_path / "cache.safetensors", other)
    assert torch.equal(go_on(other, sequences, loaded), expected)


def test_chosen_rows(model):
    _, cache = first_part(model)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.model_state["Qwen2VLModel.rope_deltas"].tolist() == [[-12], [-12]]
    cache.reset()
    assert cache.model_state == {}


def test_other_models_keep_none():
    model = families.build("llama")
    out = model.generate(families.prompt(), max_new_tokens=3, cache_implementation="kvquant-int8", **GREEDY)
    assert cache_of(out).model_state == {}
