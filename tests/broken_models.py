"""The bundled model, broken on purpose in one layer. Through a dense cache it computes the same function (nearly,
where it says so), but its keys or values break formats as those of large models do."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_kvquant.measure.text import bundled_model

HEAD_DIM, Q_PER_KV = 64, 2
# The RoPE pair with the lowest frequency, which turns by less than 0.1 in 512 positions.
SLOW = (HEAD_DIM // 2 - 1, HEAD_DIM - 1)


def healthy() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


@torch.no_grad()
def with_key_bias(layer_idx: int, size: float = 3000.0) -> LlamaForCausalLM:
    """A large constant in one channel of the first head's keys, as Qwen2's biases make it.

    Queries get a zero there, so the constant does not count; that changes the function a little."""
    plain = healthy()
    model = LlamaForCausalLM(LlamaConfig(**{**plain.config.to_dict(), "attention_bias": True})).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for layer in model.model.layers:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, projection).bias.zero_()
    attention = model.model.layers[layer_idx].self_attn
    for head in range(Q_PER_KV):
        for channel in SLOW:
            attention.q_proj.weight[head * HEAD_DIM + channel] = 0
    attention.k_proj.bias[SLOW[0]] = size
    return model


@torch.no_grad()
def with_value_token(layer_idx: int, token: int, size: float = 3000.0) -> LlamaForCausalLM:
    """One token has a massive element in channel 0 of the first head's values; the output ignores that channel, which
    changes the function a little."""
    model = healthy()
    attention, seen = model.model.layers[layer_idx].self_attn, {}

    def note(module, arguments, output):
        seen["ids"] = arguments[0]

    def enlarge(module, arguments, output):
        output = output.clone()
        output[..., 0] += size * (seen["ids"] == token)
        return output

    model.model.embed_tokens.register_forward_hook(note)
    attention.v_proj.register_forward_hook(enlarge)
    attention.o_proj.weight[:, : Q_PER_KV * HEAD_DIM : HEAD_DIM] = 0
    return model


@torch.no_grad()
def with_value_channel(layer_idx: int, channel: int = 5, factor: float = 1000.0) -> LlamaForCausalLM:
    """A channel of the first head's values is 1,000 times as large, and is divided again by the output projection."""
    model = healthy()
    attention = model.model.layers[layer_idx].self_attn
    attention.v_proj.weight[channel] *= factor
    attention.o_proj.weight[:, channel : Q_PER_KV * HEAD_DIM : HEAD_DIM] /= factor
    return model


@torch.no_grad()
def with_key_channel(layer_idx: int, channel: int = 5, factor: float = 1000.0) -> LlamaForCausalLM:
    """A RoPE pair of the first head's keys is 1,000 times as large, and its queries are divided."""
    model = healthy()
    attention = model.model.layers[layer_idx].self_attn
    for row in (channel, channel + HEAD_DIM // 2):
        attention.k_proj.weight[row] *= factor
        attention.q_proj.weight[row : Q_PER_KV * HEAD_DIM : HEAD_DIM] /= factor
    return model


@torch.no_grad()
def with_tiny_values(layer_idx: int, factor: float = 1e-9) -> LlamaForCausalLM:
    """The values of a layer are so small that FP16 has no scale for them."""
    model = healthy()
    attention = model.model.layers[layer_idx].self_attn
    attention.v_proj.weight *= factor
    attention.o_proj.weight /= factor
    return model
