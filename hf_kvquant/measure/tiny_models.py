"""A tiny random model of any architecture in transformers, from its default config; nothing is downloaded.

    for name, family in families().items():   # {"LlamaForCausalLM": Family(...), ...}
        model = family.build()

The default config is made small field by field. The name of a field tells its meaning; exceptions are in `_SPECIAL`.
Every kind of layer of the default config stays (one of each, and at least two). Weights are larger
than usual, so that attention decides the logits and a wrong cache shows.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .. import host

VOCAB = 128
FIRST_TOKEN = 64  # smaller ids are special tokens
HEAD_DIM = 16
HIDDEN = 64
MAX_LENGTH = 256
WINDOW = 24
_STD = 0.15

# The small value of a field, by its name; the first pattern that matches the whole name decides. None leaves a field.
_SIZES: list[tuple[str, Any]] = [
    (r"vocab_size_per_layer_input|(.*_)?(vocab_size|vocabulary_size)|n_vocab|padded_vocab_size|num_embeddings", VOCAB),
    (r"qk_head_dim|index_topk.*|index_kpool.*", None),
    (r"rotary_dim", 8),
    (r"linear_num_(key|value)_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads|.*ssm_num_heads|index_n_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_d_ssm|.*ssm_head_dim|mamba_headdim|index_head_dim", 32),
    (r"linear_(key|value)_head_dim|.*head_dim|d_kv|kv_channels|head_size|d_head", HEAD_DIM),
    (r"num_(global_)?key_value_heads|n_kv_heads?|num_kv_heads|.*key_value_heads|num_query_groups", "kv heads"),
    (r"num_attention_heads|num_heads|n_heads?|(.*_)?attention_heads|.*_num_heads|num_.*_heads", 4),
    (r".*(moe|expert|shared).*_(intermediate|hidden)_size|moe_ffn_.*|expert_ffn_.*", 32),
    (r".*(intermediate|ffn|ff|mlp)_(size|dim)|d_ff|.*ffn_hidden_size|n_inner|inner_size|d_inner|ff_dim", 64),
    (r"q_lora_rank|kv_lora_rank|.*lora_rank|o_lora_rank|laurel_rank", 32),
    (r"hidden_size_per_layer_input", 16),
    (r"(.*_)?(hidden_size|d_model|embed_dim|embedding_size|hidden_dim|n_embd|n_embed|model_dim|projection_dim|dim|width)"
     r"|word_embed_proj_dim|qformer_hidden_size|.*_embed_(dim|size)|out_hidden_size|.*output_dim|lru_width", HIDDEN),
    (r"n_routed_experts|(moe_)?num_(local_)?experts|num_routed_experts|n_experts|.*num_experts", 2),
    (r"(.*num_)?experts_per_tok(en)?|.*top_?k(_experts)?|moe_topk|num_selected_experts|moe_k", 2),
    (r"n_group|topk_group|n_groups|num_expert_group|num_limited_groups", 1),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|moe_layer_start_index|first_dense_layers", 1),
    (r"max_position_embeddings|n_positions|max_.*position.*|seq_length|n_ctx|max_seq(uence)?_len(gth)?", MAX_LENGTH),
    (r"sliding_window(_size)?|window_size|attention_window|local_attention_window|attention_window_size", WINDOW),
    (r"attention_chunk_size", 32),
    (r".*d_state|ssm_state_size|.*state_size", 16),
    (r"initializer_range|init_std", "std"),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"depth|depths|num_stages", 1),
]  # fmt: skip
_LAYERS = re.compile(
    r"num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_(en|de)coder_layers|num_hidden_layers|layers|"
    r".*_layers|.*num_blocks"
)
_MROPE = [2, 3, 3]  # halves of head_dim for time, height and width
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _MROPE}
# Fields that no rule covers, by config class: those that a checkpoint sets and the default leaves open, or that depend
# on one another. A sliding window that newer checkpoints of a family do not have is left out.
_SPECIAL: dict[str, dict] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5}},
    "CohereCompassTextConfig": {
        "rope_parameters": {kind: dict(_ROPE) for kind in ("full_attention", "sliding_attention")}
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
    },
    "DeepseekV2Config": {"n_routed_experts": 2, "num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteConfig": {"adapter_input_size": HIDDEN},
    "Emu3Config": {"vocabulary_map": {"<image>": 5}},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": HIDDEN // 4},
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 0},
    "Glm46VTextConfig": {"rope_parameters": _ROPE},
    "Glm4vTextConfig": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}},
    "Glm4vMoeTextConfig": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}},
    "GlmOcrTextConfig": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HunYuanDenseV1Config": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1Config": {"head_dim": HEAD_DIM},
    "HunYuanVLTextConfig": {"head_dim": HEAD_DIM},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": HEAD_DIM},
    "MinistralConfig": {"head_dim": HEAD_DIM, "layer_types": ["full_attention", "sliding_attention"]},
    "MistralConfig": {"sliding_window": None},
    "NemotronConfig": {"head_dim": HEAD_DIM, "num_key_value_heads": 2},
    "PaddleOCRTextConfig": {"rope_parameters": _ROPE},
    "Qwen2VLTextConfig": {"rope_parameters": _ROPE},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _ROPE},
    "Qwen2_5OmniTextConfig": {"rope_parameters": _ROPE},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 5},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 5},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "ReformerConfig": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


@dataclass(frozen=True)
class Family:
    """One model class: its name, the config type that the auto class builds it from, and which auto class has it."""

    model: str
    model_type: str
    kind: str

    def build(self, attn: str | None = None) -> transformers.PreTrainedModel:
        """A float32 model in eval mode, the same one every time; `attn` as in `attn_implementation`."""
        model_class = getattr(transformers, self.model)
        config = tiny_config(model_class.config_class or CONFIG_MAPPING[self.model_type], self.kind)
        host.set_attn_implementation(config, attn, nested=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.decoder_start_token_id = 0
        return model.eval().to(torch.float32)


_AUTO = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


def families() -> dict[str, Family]:
    """Every model class that transformers' auto classes generate text with, by name, in their order."""
    found: dict[str, Family] = {}
    for kind, mapping in _AUTO.items():
        for model_type, names in sorted(host.auto_class_names(mapping).items()):
            for name in [names] if isinstance(names, str) else names:
                squashed = model_type.replace("_", "").replace("-", "")
                if name not in found or (found[name].kind == kind and name.lower().startswith(squashed)):
                    found[name] = Family(name, model_type, kind)
    return found


def tiny_config(config_class: type[PreTrainedConfig], kind: str) -> PreTrainedConfig:
    config = _shrunk(config_class())
    decoder = config.get_text_config(decoder=True)
    if kind == "causal" and hasattr(decoder, "is_decoder") and not config.is_encoder_decoder:
        decoder.is_decoder = True
    return config


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    special = _SPECIAL.get(type(config).__name__, {})
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = [n for n, v in given.items() if _LAYERS.fullmatch(n) and _is_int(v) and v > 0]
    picks = _picked_layers(given, max((given[n] for n in layers), default=0))
    small: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value).to_dict()
        elif name in layers:
            small[name] = min(value, len(picks.get(value, (0, 1))))
        elif isinstance(value, (list, tuple)) and len(value) in picks and len(value) > 1:
            small[name] = [value[i] for i in picks[len(value)]]
        elif name.endswith(("token_id", "token_index")):
            small[name] = _token(name, value)
        else:
            size = _size(name, value, given)
            if size is not None:
                small[name] = size
    if isinstance(rope := given.get("rope_parameters"), dict) and "mrope_section" in rope:
        small["rope_parameters"] = rope | {"mrope_section": _MROPE}
    if "use_cache" in given:
        small["use_cache"] = True
    known = _parameters(type(config))
    return type(config)(**{name: value for name, value in small.items() if name in known} | special)


def _parameters(config_class: Any) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class) if field.init}
    return set(config_class.__init__.__code__.co_varnames)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _picked_layers(given: dict, most: int) -> dict[int, tuple[int, ...]]:
    """For each number of layers, those that stay: one of every kind that the lists of this length distinguish."""
    counts = {v for n, v in given.items() if _LAYERS.fullmatch(n) and _is_int(v) and v > 1}
    picks = {}
    for count in counts:
        lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == count]
        kinds = [repr([values[i] for values in lists]) for i in range(count)]
        first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:6]
        if len(first) == 1:
            first.append(first[0] + 1)
        picks[count] = tuple(sorted(first))
    return picks


def _token(name: str, value: Any) -> object:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    if name in special:
        return special[name]
    if _is_int(value) and value >= 0:
        return 3 + sum(map(ord, name)) % (FIRST_TOKEN - 3)
    return value


def _size(name: str, value: Any, given: dict) -> object | None:
    for pattern, size in _SIZES:
        if not re.fullmatch(pattern, name):
            continue
        if size is None:
            return None
        if size == "std":
            return _STD if isinstance(value, float) else None
        if size == "kv heads":
            heads = next(
                (given[n] for n in ("num_attention_heads", "num_heads", "n_head") if _is_int(given.get(n))), 0
            )
            return None if not _is_int(value) else 1 if value == 1 else 4 if value == heads else 2
        return min(size, value) if _is_int(value) and not isinstance(size, str) and value > 0 else None
    return None
