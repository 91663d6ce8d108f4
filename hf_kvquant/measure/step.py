"""A whole decode step: a Llama, or with a window a Mistral, of a given shape with random weights, through any cache.

The residual stream, MLP and vocabulary may be small on purpose: a step is timed for its cache, and in a real model the
rest of it takes longer. Every cache is given the same random K and V in one update, as a prefill would. Caches are
lossy and the weights are random, so logits are compared loosely: as a share of the error of a cache with wrong keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ..cache import QuantizedCache
from ..host import CACHE
from ..integration import attention
from .caches import Candidate
from .clock import seconds_of

# The largest relative error of the logits against the dense cache's, by bits of a code, as a share of the error that a
# cache with wrong keys has in the same run. It is loose, because random weights amplify errors: measured shares are at
# most 0.82, 0.51, 0.36, 0.10 and 0.02.
NEAR_DENSE = {2: 0.9, 3: 0.7, 4: 0.5, 8: 0.2, 16: 0.05, 32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of its cache."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 256
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"
    tied: bool = False  # input and output embedding are one
    window: int | None = None  # tokens that a query sees in every layer; None: all

    @property
    def elements_per_token(self) -> int:
        """The elements of keys and values together per token of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def model_config(shape: Shape, max_length: int) -> Any:
    """A `LlamaConfig`, or with a window a `MistralConfig`."""
    kind: Any = LlamaConfig if shape.window is None else partial(MistralConfig, sliding_window=shape.window)
    return kind(
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max_length,
        # Every projection keeps the size of its input, so that attention matters in the logits.
        initializer_range=shape.hidden**-0.5,
        attn_implementation="sdpa",
    )


def build_model(shape: Shape, max_length: int, dtype: torch.dtype | None = None) -> Any:
    """Random weights that the shape's dtype can hold, stored as `dtype`; the same for every candidate."""
    torch.manual_seed(0)
    with torch.device(shape.device):
        kind: Any = LlamaForCausalLM if shape.window is None else MistralForCausalLM
        model = kind(model_config(shape, max_length)).eval()
    for parameter in model.parameters():
        # Only parameters change: the frequencies of the position embedding stay float32, as in a loaded model.
        parameter.data = parameter.data.to(shape.dtype).to(dtype or shape.dtype)
    model.compiled_forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    return model


def random_states(shape: Shape, length: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[batch, kv_heads, length, head_dim]` of a layer, the same for every candidate."""
    generator = torch.Generator(shape.device).manual_seed(layer_idx)
    size = (shape.batch, shape.kv_heads, length, shape.head_dim)
    key, value = (torch.randn(size, generator=generator, device=shape.device).to(shape.dtype) for _ in range(2))
    return key, value


def fill(
    cache: Cache, shape: Shape, length: int, dtype: torch.dtype | None = None, roll: int = 0, rows: int | None = None
) -> Cache:
    """Give `cache` all tokens in one update per layer, as `dtype`; returns it.

    Args:
        roll: shifts the keys against the values.
        rows: the number of sequences, the first of the batch.
    """
    for layer_idx in range(shape.layers):
        key, value = (x[:rows].to(dtype or shape.dtype) for x in random_states(shape, length, layer_idx))
        cache.update(key.roll(roll, dims=2), value, layer_idx)
    if isinstance(cache, QuantizedCache):
        # Usually learned in prefill, which is not run here: Llama's attention takes states as the cache returns them.
        cache.enable_fused()
    return cache


def filled(candidate: Candidate, config: LlamaConfig, shape: Shape, length: int, room: int, **options) -> Cache:
    """The candidate's cache with `length` tokens, and room for more; `options` are `fill`'s."""
    options = {"dtype": candidate.dtype, **options}
    return fill(candidate.build(config, length + room), shape, length, **options)


@torch.no_grad()
def step(forward: Callable, cache: Cache, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens `[batch]` and the logits `[batch, vocab_size]`; as timed."""
    logits = forward(input_ids=token, **{CACHE: cache}).logits[:, -1]
    return logits.argmax(-1), logits


def switched(model: LlamaForCausalLM, cache: Cache):
    """The context in which the model's attention can read the cache; transformers' caches need none."""
    return attention(model) if isinstance(cache, QuantizedCache) else contextlib.nullcontext()


def time_steps(
    runs: Mapping[str, tuple[LlamaForCausalLM, Callable, Cache]], fed: Sequence[torch.Tensor], in_a_row: int = 1
) -> dict[str, list[float]]:
    """Seconds of the steps of every run (a model, the forward that runs it, and its cache), which take turns.

    A turn has `in_a_row` of the tokens that are fed. If these are several, the first is not counted: as in generation,
    a step then finds in the processor's caches what its predecessor left there.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(0, len(fed), in_a_row):
        for name, (model, forward, cache) in runs.items():
            with switched(model, cache):
                turn = [seconds_of(lambda f=forward, c=cache, t=t: step(f, c, t)) for t in fed[i : i + in_a_row]]
            samples[name] += turn[in_a_row > 1 :]
    return samples


def tokens(shape: Shape, n: int) -> torch.Tensor:
    """The tokens `[n, batch, 1]` to feed, the same for every candidate, whatever it predicts."""
    return torch.randint(shape.vocabulary, (n, shape.batch, 1), generator=torch.Generator().manual_seed(1))


def first_logits(
    model: LlamaForCausalLM, cache: Cache, shape: Shape, n: int, forward: Callable | None = None
) -> torch.Tensor:
    """Logits `[n, batch, vocab_size]` of the first n steps (by `forward`, default: the model), float32."""
    with switched(model, cache):
        return torch.stack([step(forward or model, cache, token)[1].float() for token in tokens(shape, n)])


def all_fused(cache: QuantizedCache, steps: int) -> bool:
    """Whether every step so far, of every layer, read the cache as it is stored."""
    routes = cache.routes
    return routes["decode_fused"] == len(cache.quantized_layers) * steps and routes["decode_dequantized"] == 0
