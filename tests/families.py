"""Tiny random models of every family that generation is tested with; nothing is downloaded.

    model = families.build("llama")            # float32, sdpa
    ids = families.prompt(model, batch=2, length=70)

Weights are larger than usual, so that attention decides the logits and a wrong cache shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers

from hf_kvquant import host

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "head_dim": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512}


@dataclass(frozen=True)
class Family:
    """How a tiny model is made: the names of its config and model class, and what differs from `COMMON`.

    `num_full`: the number of layers that a quantized cache stores. `fused`: whether attention takes states as stored.
    """

    config: str
    model: str
    options: dict = field(default_factory=dict)
    num_full: int = 2
    fused: bool = True
    without: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 128}),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "gemma2": Family(
        "Gemma2Config", "Gemma2ForCausalLM",
        {"sliding_window": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 64}, num_full=2,
    ),
    "gemma3": Family(
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {"sliding_window": 24, "query_pre_attn_scalar": 64, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, num_full=1,
    ),
    "phi3": Family(
        "Phi3Config", "Phi3ForCausalLM", {"sliding_window": None, "num_attention_heads": 2, "num_key_value_heads": 1}
    ),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", {"num_attention_heads": 2}),
    "opt": Family(
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 128, "num_attention_heads": 2},
    ),
    "gpt_oss": Family(
        "GptOssConfig", "GptOssForCausalLM",
        {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4},
        num_full=2,
    ),
    "t5": Family(
        "T5Config", "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 64, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0, "initializer_factor": 1.0},
        without=("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"),
    ),
    # Attention code of their own: the states that they get record what is done with them.
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 32, "n_inner": 128}),
    "bloom": Family("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
    "falcon": Family(
        "FalconConfig", "FalconForCausalLM",
        {"num_attention_heads": 2, "num_kv_heads": 1, "new_decoder_architecture": True}, without=("head_dim",),
    ),
    # Its cache holds latents; see hf_kvquant/latent.py.
    "deepseek_v3": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
         "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 32, "first_k_dense_replace": 1}, without=("head_dim",),
    ),
}  # fmt: skip

# No attention at all.
OTHERS = {"mamba": Family("MambaConfig", "MambaForCausalLM", num_full=0, without=("num_attention_heads", "head_dim"))}

# More kinds, for test_contract.py only: experts, linear attention beside full attention (in one layer, and layer by
# layer), and an encoder-decoder model with learned positions.
MORE = {
    "mixtral": Family(
        "MixtralConfig", "MixtralForCausalLM",
        {"sliding_window": None, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "falcon_h1": Family(
        "FalconH1Config", "FalconH1ForCausalLM",
        {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    "jamba": Family(
        "JambaConfig", "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 2,
         "use_mamba_kernels": False, "mamba_d_state": 16}, num_full=1, without=("head_dim",),
    ),
    "bart": Family(
        "BartConfig", "BartForConditionalGeneration",
        {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.15,
         "decoder_start_token_id": 0, "forced_eos_token_id": None},
        without=("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"),
    ),
    # Its prepare_inputs_for_generation drops a cache of up to 10 tokens when the sequence is longer.
    "longrope": Family(
        "Phi3Config", "Phi3ForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": None,
         "original_max_position_embeddings": 10,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.0,
                             "short_factor": [1.0] * 32,
                             "long_factor": [4.0] * 32, "original_max_position_embeddings": 10}},
    ),
    # Layers 1 and 3 attend to an image; see `image`.
    "mllama": Family("MllamaConfig", "MllamaForConditionalGeneration"),
}  # fmt: skip

# Their sliding layers are quantized, too, where the config asks for windows this narrow; Llama 4 has chunks.
SLIDING = {
    "mistral_window": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": 24}),
    "gemma3_window": Family(
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {"sliding_window": 24, "query_pre_attn_scalar": 64, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, num_full=3,
    ),
    "llama4_chunks": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {"attention_chunk_size": 24, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
         "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
    # Linear states beside sliding and beside full attention, in one layer each. There is one expert, because a token
    # that goes to another one differs by more than any format makes it.
    "zaya_window": Family(
        "ZayaConfig", "ZayaForCausalLM",
        {"sliding_window": 24, "layer_types": ["hybrid_sliding", "hybrid"], "num_experts": 1, "router_hidden_size": 32,
         "moe_intermediate_size": 64, "experts_implementation": "eager"},
    ),
}  # fmt: skip

_RELEASE = tuple(map(int, host.VERSION.split(".")[:2]))
# Before 5.20 the call that drops the cache has only the newest token, so the dense cache's text is wrong, too.
LONGROPE_LOSES_TOKENS = _RELEASE < (5, 20)
# Before 5.19 a dense sliding layer returns more states than its mask has columns if several calls precede a crop.
DENSE_WINDOWS_FAIL_ASSISTED = _RELEASE < (5, 19)

ALL = FAMILIES | OTHERS | MORE | SLIDING

# Options that make a family smaller still; some families have names of their own.
_SMALL = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
_SMALLER = {
    "gpt2": {"n_embd": 64, "n_head": 4},
    "gemma2": _SMALL | {"query_pre_attn_scalar": 16},
    "gemma3": _SMALL | {"query_pre_attn_scalar": 16},
    "gemma3_window": _SMALL | {"query_pre_attn_scalar": 16},
    "bart": {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "deepseek_v3": {"hidden_size": 64, "intermediate_size": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
                    "v_head_dim": 16, "moe_intermediate_size": 16},
    "falcon_h1": _SMALL | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"hidden_size": 64, "intermediate_size": 64},
    "longrope": {},
    "mllama": {},
}  # fmt: skip


def small(name: str) -> dict:
    """Options for `build` that make a family's model as small as its attention allows: head_dim 16."""
    return _SMALLER.get(name, _SMALL)


def config(name: str, **options) -> transformers.PreTrainedConfig:
    if name == "mllama":
        return _mllama_config(**options)
    family = ALL[name]
    common = {key: value for key, value in COMMON.items() if key not in family.without}
    return getattr(transformers, family.config)(**common | family.options | options)


def _mllama_config(**options) -> transformers.MllamaConfig:
    text = {key: value for key, value in COMMON.items() if key != "head_dim"} | {
        "num_hidden_layers": 4, "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_global_layers": 1, "vision_output_dim": 64, "image_size": 16, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 2]],
    }  # fmt: skip
    return transformers.MllamaConfig(vision_config=vision, text_config=text | options, image_token_index=VOCAB - 1)


def image(batch: int, length: int) -> dict:
    """An image of 20 tokens for each row of a text `[batch, length]`, as Mllama takes it."""
    pixels = torch.randn(1, 1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {
        "pixel_values": pixels.expand(batch, *pixels.shape[1:]),
        "aspect_ratio_ids": torch.full((batch, 1), 3),
        "aspect_ratio_mask": torch.ones(batch, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(batch, length, 1, 4, dtype=torch.long),
    }


def build(name: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa", seed: int = 0, **options):
    """A model in eval mode, the same one for the same arguments."""
    family = ALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = config(name, **options)
        settings._attn_implementation = attn
        model = getattr(transformers, family.model)(settings)
    if name == "llama4_chunks" and _RELEASE < (5, 19):
        # There the rotary factors have another memory layout for one token than for several, and float32 products of
        # them are rounded otherwise. A rounding is enough for another code of int8.
        model.model.rotary_emb.register_forward_hook(lambda module, args, factors: factors.contiguous())
    if name == "mllama":
        for layer in settings.get_text_config().cross_attention_layers:
            # These gates are zero until training changes them.
            decoder_layer = model.model.language_model.layers[layer]
            decoder_layer.cross_attn_attn_gate.data.fill_(1.0)
            decoder_layer.cross_attn_mlp_gate.data.fill_(1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().to(dtype)


def prompt(batch: int = 1, length: int = 70, seed: int = 1) -> torch.Tensor:
    """Random token ids `[batch, length]` without special tokens."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class Say:
    """A logits processor that makes generation say given tokens `[batch, n]`."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        said = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return said
