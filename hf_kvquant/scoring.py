"""Decode-faithful scoring: the logits of real decode through a quantized cache, in one parallel pass.

Prefill is un-quantized, so one forward pass over a whole text never reads a quantized cache, and perplexity measured
that way is perfect for any format. Here the rows of the context attend densely, and every scored row reads each key
and value
as decode would: which columns are exact depends only on the query's position (see `states`), so no loop over tokens is
needed.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .attention import attend
from .cache import QuantizedCache, QuantizedLayer
from .config import KVQuantConfig
from .integration import attention
from .quantization import QuantSpec, quantize
from .reference import mask_rows
from .states import dense_from

DENSE = "none"
_ROWS = 256


@torch.no_grad()
def score(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_lengths: int | Sequence[int] | torch.Tensor,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None = None,
    **model_kwargs,
) -> torch.Tensor:
    """Logits `[batch, length, vocab]` as decode gives them after prefilling `context_lengths` columns of each row.

    Rows of the context are those of prefill: the first row that read the cache is row `context_length`, whose logits
    predict the token after it. See `cache_read_share`.

    Args:
        input_ids: `[batch, length]`.
        context_lengths: columns that are prefilled, per row or for all, 1 to length; padding columns count.
        kv_config: how the cache is quantized; "none" for the dense cache.
        attention_mask: `[batch, length]`, 0 for (left) padding.
        model_kwargs: passed on to the model's forward.

    Raises:
        ValueError: a context length out of range, or a model whose attention cannot be scored in one pass.
    """
    batch, length = input_ids.shape
    contexts = torch.as_tensor(context_lengths, device=input_ids.device).expand(batch)
    if bool((contexts < 1).any()) or bool((contexts > length).any()):
        raise ValueError(f"context_lengths: {contexts.tolist()} is not allowed; expected 1 to {length} (the length)")
    model_kwargs = _mask_inputs(model, attention_mask, 0, length) | model_kwargs
    if kv_config == DENSE:
        return model(input_ids, use_cache=False, **model_kwargs).logits
    padding = None if attention_mask is None else attention_mask == 0
    cache = _ScoringCache(model, KVQuantConfig.load(kv_config), contexts, padding)
    with attention(model, _attend, name="kvquant-score"):
        return model(input_ids, past_key_values=cache, use_cache=True, **model_kwargs).logits


@torch.no_grad()
def score_by_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_length: int,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None = None,
    chunk: int = 1,
) -> torch.Tensor:
    """The same logits by real decode through a `QuantizedCache`: prefill, then `chunk` tokens at a time.

    Slow; it is what `score` is tested against, and works for every model.
    """
    length = input_ids.shape[1]
    cache = QuantizedCache(model.config, kv_config, max_length=length, attention_mask=attention_mask)
    cuts = [0, *range(context_length, length, chunk), length]
    logits = []
    with attention(model):
        for start, end in itertools.pairwise(cuts):
            inputs = _mask_inputs(model, attention_mask, start, end)
            logits.append(model(input_ids[:, start:end], past_key_values=cache, use_cache=True, **inputs).logits)
    return torch.cat(logits, dim=1)


def _mask_inputs(model: PreTrainedModel, attention_mask: torch.Tensor | None, start: int, end: int) -> dict:
    """What a forward over the columns `start .. end` needs to know of padding."""
    if attention_mask is None:
        return {}
    inputs = {"attention_mask": attention_mask[:, :end]}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:end]
    return inputs


def cache_read_share(context_lengths: Sequence[int], scored_from: Sequence[int], lengths: Sequence[int]) -> float:
    """The share of scored tokens whose logits read the cache.

    Token t is predicted by row t - 1, which read the cache iff t - 1 >= context_length. Row r scores the tokens
    `scored_from[r] .. lengths[r]`.
    """
    read = sum(max(0, n - max(s, c + 1)) for c, s, n in zip(context_lengths, scored_from, lengths))
    scored = sum(n - s for s, n in zip(scored_from, lengths))
    return read / scored if scored else 0.0


class ScoredStates:
    """Keys or values of one layer for all queries at once: the exact ones, and what their quantized copies say."""

    def __init__(self, states: torch.Tensor, spec: QuantSpec, layer: _ScoringLayer):
        self.exact, self.layer = states, layer
        self.spec = spec if spec.is_dense else spec.resolve(states.shape[-1])
        self.shape, self.dtype, self.device = states.shape, states.dtype, states.device
        self.routes = Counter()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise ValueError(
            f"score: {getattr(func, '__name__', func)} changes the cached states before attention; {_REFUSED}"
        )

    def __getattr__(self, name: str):
        raise AttributeError(f"score: .{name} of the cached states is asked for before attention; {_REFUSED}")

    def dequantize(self, position: int):
        raise ValueError(f"score: attention needs de-quantized states (see the warning before this); {_REFUSED}")

    def body(self, dtype: torch.dtype) -> torch.Tensor:
        """De-quantized copies of all columns, `[batch, num_kv_heads, length, head_dim]`."""
        if self.spec.is_dense:
            return self.exact.to(dtype)
        return quantize(self.exact, self.spec, self.layer.padding).dequantize(dtype)

    def read_exactly(self, start: int, end: int) -> torch.Tensor:
        """Which columns the queries `start .. end` read exactly, bool `[batch, 1, end - start, length]`."""
        layer = self.layer
        columns = torch.arange(self.shape[2], device=self.device)
        first = torch.tensor([dense_from(i, self.spec, layer.recent_length) for i in range(start, end)])
        near = columns >= first.to(self.device)[:, None]
        in_context = torch.arange(start, end, device=self.device)[:, None] < layer.contexts[:, None, None]
        is_sink = columns < layer.sink_length
        if layer.padding is not None:
            token = ~layer.padding
            is_sink = (token & (token.long().cumsum(1) <= layer.sink_length))[:, None]
        return (near | in_context | is_sink)[:, None]


_REFUSED = "this model cannot be scored in one pass, use score_by_decoding"


def _attention(query, keys: ScoredStates, values: ScoredStates, mask, s_aux, *, scaling: float, softcap: float):
    """`reference.decode_attention` for all queries of a text, each reading what it would read in decode."""
    length, num_heads = keys.shape[2], query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(num_heads // x.shape[1], dim=1)

    k_exact, v_exact = per_head(keys.exact.to(dtype)), per_head(values.exact.to(dtype))
    k_body, v_body = per_head(keys.body(dtype)), per_head(values.body(dtype))
    outputs = []
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        q = query[:, :, start:end].to(dtype)
        hidden, bias = mask_rows(mask, start, end, length, length, dtype, query.device)
        scores = torch.where(keys.read_exactly(start, end), q @ k_exact.mT, q @ k_body.mT) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = (scores + bias).masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(-1)[..., :length].masked_fill(hidden, 0.0)
        exactly = values.read_exactly(start, end)
        outputs.append(weights.masked_fill(~exactly, 0.0) @ v_exact + weights.masked_fill(exactly, 0.0) @ v_body)
    return torch.cat(outputs, dim=2).to(query.dtype)


_attend = partial(attend, states_type=ScoredStates, operator=_attention)


class _ScoringLayer(DynamicLayer):
    """Stands where `QuantizedLayer` stands in decode; sees every token in one update."""

    def __init__(self, specs: tuple[QuantSpec, QuantSpec], config: KVQuantConfig, contexts, padding):
        super().__init__()
        self.specs, self.contexts, self.padding = specs, contexts, padding
        self.recent_length, self.sink_length = config.recent_length, config.sink_length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return tuple(ScoredStates(x, spec, self) for x, spec in zip((key_states, value_states), self.specs))

    def get_seq_length(self) -> int:
        return 0


class _ScoringCache(DynamicCache):
    """The layers of a `QuantizedCache`, those that it quantizes replaced by `_ScoringLayer`."""

    def __init__(
        self, model: PreTrainedModel, config: KVQuantConfig, contexts: torch.Tensor, padding: torch.Tensor | None
    ):
        layers = QuantizedCache(model.config, config).layers
        for i, layer in enumerate(layers):
            if isinstance(layer, QuantizedLayer):
                layers[i] = _ScoringLayer(config.for_layer(i), config, contexts, padding)
        Cache.__init__(self, layers=layers)
