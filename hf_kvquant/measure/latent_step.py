"""A decode step of one layer of multi-head latent attention (DeepSeek V3), through any cache of latents.

The layer has random weights, and its cache random latents, which it gets in one update. Besides transformers' way,
which expands all latents at every step, there is a dense one that absorbs the up-projections as `hf_kvquant.latent`
does, in torch: the fastest that a dense cache allows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from ..cache import QuantizedCache
from ..config import KVQuantConfig
from ..host import CACHE, attn_implementation, set_attn_implementation
from ..integration import attention

ABSORBED = "absorbed_dense"


@dataclass(frozen=True)
class LatentShape:
    """The shape of a layer; the default is DeepSeek V3's."""

    heads: int = 128
    hidden: int = 7168
    latent: int = 512
    rotary: int = 64
    nope: int = 128
    value: int = 128
    query_rank: int = 1536
    dtype: torch.dtype = torch.bfloat16


def build(shape: LatentShape, seed: int = 0) -> DeepseekV3ForCausalLM:
    """A model of one layer, whose MLP and vocabulary are small."""
    config = DeepseekV3Config(
        num_hidden_layers=1, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        hidden_size=shape.hidden, kv_lora_rank=shape.latent, qk_rope_head_dim=shape.rotary,
        qk_nope_head_dim=shape.nope, v_head_dim=shape.value, q_lora_rank=shape.query_rank,
        intermediate_size=128, first_k_dense_replace=1, vocab_size=64, max_position_embeddings=1 << 18,
        initializer_range=shape.hidden**-0.5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype=shape.dtype,
    )  # fmt: skip
    set_attn_implementation(config, "sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            return DeepseekV3ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def random_latents(shape: LatentShape, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[1, 1, length, latent]`, normalised as the layer's norm leaves them, and rotary keys."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 1, length, shape.latent, generator=generator)
    latents = latents * latents.pow(2).mean(-1, keepdim=True).rsqrt()
    rotary = torch.randn(1, 1, length, shape.rotary, generator=generator)
    return latents.to(shape.dtype), rotary.to(shape.dtype)


class Preallocated:
    """A dense cache of one layer with room for all tokens, so that no step copies it."""

    def __init__(self, latents: torch.Tensor, rotary: torch.Tensor, room: int):
        self.length = latents.shape[2]
        self._stored = [torch.nn.functional.pad(x, (0, 0, 0, room)) for x in (latents, rotary)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(self, *new: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        end = self.length + new[0].shape[2]
        for stored, x in zip(self._stored, new):
            stored[:, :, self.length : end] = x
        self.length = end
        return tuple(x[:, :, :end] for x in self._stored)


def dense_cache(model: DeepseekV3ForCausalLM, latents: torch.Tensor, rotary: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.update(latents, rotary, 0)
    return cache


def quantized_cache(
    model: DeepseekV3ForCausalLM, config: KVQuantConfig, latents: torch.Tensor, rotary: torch.Tensor, room: int
) -> QuantizedCache:
    """A cache that is read as stored from the first step on."""
    cache = QuantizedCache(model.config, config, max_length=latents.shape[2] + room)
    cache.update(latents, rotary, 0)
    cache.enable_fused()
    return cache


def step(model: Any, cache: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The output `[1, 1, hidden]` of the layer's attention for one more token."""
    position = torch.tensor([[cache.get_seq_length()]])
    rotary = model.model.rotary_emb(hidden, position)
    context: Any = contextlib.nullcontext()
    if isinstance(cache, QuantizedCache):
        context = attention(model)
    elif isinstance(cache, Preallocated):
        context = _absorbed(model)
    with context:
        return model.model.layers[0].self_attn(hidden, rotary, None, **{CACHE: cache})[0]


@contextlib.contextmanager
def _absorbed(model: Any) -> Iterator[None]:
    """Within this context the layer attends to dense latents, which it does not expand."""
    layer, before = model.model.layers[0].self_attn, attn_implementation(model.config)
    AttentionInterface.register(ABSORBED, _attend)
    set_attn_implementation(model.config, ABSORBED)
    layer.expand_kv = lambda latents, rotary: (latents, rotary)
    try:
        yield
    finally:
        del layer.expand_kv
        set_attn_implementation(model.config, before)


def _attend(
    module: Any,
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    mask: None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    weight = module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank)
    nope = module.qk_nope_head_dim
    absorbed = query[..., :nope] @ weight[:, :nope]
    latents, rotary = latents[0, 0], rotary[0, 0]
    scores = absorbed[0, :, 0] @ latents.T + query[0, :, 0, nope:] @ rotary.T
    weights = (scores.float() * scaling).softmax(-1).to(query.dtype)
    output = (weight[:, nope:] @ (weights @ latents)[None, :, :, None]).mT
    return output.transpose(1, 2).contiguous(), None


def tasks(
    model: DeepseekV3ForCausalLM, caches: dict[str, Any], hidden: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """A call for each cache, that makes a step; the cache then has one more token."""
    return {name: (lambda cache=cache: step(model, cache, hidden)) for name, cache in caches.items()}
