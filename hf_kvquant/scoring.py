"""Decode-faithful scoring: the logits of real decode through a quantized cache, in one parallel pass.

    logits = score(model, input_ids, context_lengths=128, kv_config="int4")  # [batch, length, vocab]
    for start, logits in score_chunks(model, input_ids, 128, "int4"): ...    # the same, in chunks
    log_probs, is_greedy = score_tokens(model, input_ids, 128, "int4")       # enough for perplexity
    log_probs, _ = score_tokens(..., straight_through=True)                  # with gradients, for training

Prefill is un-quantized, so one forward pass over a whole text never reads a quantized cache, and perplexity measured
that way is perfect for any format. Here the rows of the context attend densely, and every scored row reads each key
and value as decode would. Which of them it reads exactly depends only on its position (see `states`), so no loop over
tokens is needed.

A text goes through the model in chunks of a fixed length, so memory grows with the cache, not with its square, nor
with length times vocabulary. Chunks change the result by rounding only.

With `straight_through` the same values have gradients, with which a model can be trained on text that it generated
from a quantized cache. Quantization counts as adding a constant, so gradients pass it unchanged (the straight-through
estimator, Bengio et al. 2013, arXiv:1308.3432). Backward computes each chunk anew, and each few rows of its attention,
so that beside the cache it needs the activations of one chunk.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel

from . import latent
from .attention import attend
from .cache import QuantizedCache
from .config import KVQuantConfig
from .evicting import EvictingQuantizedLayer
from .feedback import factors_in
from .host import DynamicLayer, DynamicSlidingWindowLayer, cache_inputs, keeps_caches, takes
from .integration import attention
from .layers import QuantizedLayer
from .message import told
from .quantization import QuantizedTensor, QuantSpec, quantize
from .reference import mask_rows
from .route import Routes
from .states import autocast, dense_from, mask_length

DENSE = "none"
CHUNK_LENGTH = 1024
# Every block length divides it, so no chunk splits a block of the channel grid.
_CHUNK_MULTIPLE = 256
# The most attention scores in memory at once. It limits how many queries are computed together (one at least).
_MAX_SCORES = 2**24
_MAX_ROWS = 256
# The arguments and the result of `quantize`.
Quantizer = Callable[[torch.Tensor, QuantSpec, torch.Tensor | None], Any]
# The functions for the keys and for the values of a layer, by its number.
Quantizers = Callable[[int], tuple[Quantizer, Quantizer]]


def score(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_lengths: int | Sequence[int] | torch.Tensor,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None = None,
    *,
    decode_tail: int = 0,
    chunk_length: int = CHUNK_LENGTH,
    straight_through: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Logits `[batch, length, vocab]` as decode gives them after prefilling `context_lengths` positions of each row.

    Rows of the context are those of prefill. The first row that reads the cache is row `context_length`, whose logits
    predict the token after it. See `cache_read_share`.

    Args:
        input_ids: `[batch, length]`.
        context_lengths: the number of positions to prefill, padding included, per row or for all; 1 to length.
        kv_config: how the cache is quantized; "none" for the dense cache.
        attention_mask: `[batch, length]`, 0 for (left) padding. Padding on the right needs no mask.
        decode_tail: the number of context positions, the last ones, to decode instead of prefilling (one is prefilled
            at least), so that even the token after the context is predicted from the cache. It does no more than
            shorten the context: give `cache_read_share` the same number.
        chunk_length: positions per forward call, a multiple of 256.
        straight_through: whether the result has gradients, which pass the quantization unchanged.
        model_kwargs: passed on to the model's forward.

    Raises:
        ValueError: an argument out of range, or a model whose attention cannot be scored in one pass.
    """
    options = {"decode_tail": decode_tail, "chunk_length": chunk_length, "straight_through": straight_through}
    options |= model_kwargs
    chunks = [
        part for _, part in score_chunks(model, input_ids, context_lengths, kv_config, attention_mask, **options)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def score_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_lengths: int | Sequence[int] | torch.Tensor,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities that `score` gives to the tokens of the text itself, without keeping all logits in memory.

    Returns:
        For the tokens `input_ids[:, 1:]`: natural log-probabilities, float32 `[batch, length - 1]`, and whether each
        is the most likely one, bool. Arguments and errors are those of `score`.
    """

    def predicted(start: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = input_ids[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
        logits = logits[:, : targets.shape[1]]
        log_probs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]
        return log_probs, logits.argmax(-1) == targets

    arguments = (model, input_ids, context_lengths, kv_config, attention_mask)
    log_probs, is_greedy = zip(*(found for _, found in _score_chunks(predicted, *arguments, **options)))
    return torch.cat(log_probs, dim=1), torch.cat(is_greedy, dim=1)


def score_chunks(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_lengths: int | Sequence[int] | torch.Tensor,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits of `score` in chunks: pairs of a first row and the logits `[batch, rows, vocab]` from there on.

    Rows before `first_row` are left out, and not even computed if the model can skip them (`logits_to_keep`). The
    model is free for other use between two chunks. Layers other than full and sliding attention (linear ones) carry a
    state that transformers cannot continue by several tokens, so such a model takes the whole text as one chunk.

    `quantizers(layer_idx)` take the place of `quantize` for keys and for values, so that other schemes can be scored
    with the config's exact tokens. What they return has a method `dequantize(dtype)`.
    """
    arguments = (model, input_ids, context_lengths, kv_config, attention_mask)
    return _score_chunks(lambda start, logits: logits, *arguments, **options)


def _score_chunks(
    result: Callable,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    context_lengths: int | Sequence[int] | torch.Tensor,
    kv_config: KVQuantConfig | str | Path | dict,
    attention_mask: torch.Tensor | None,
    *,
    decode_tail: int = 0,
    chunk_length: int = CHUNK_LENGTH,
    first_row: int = 0,
    quantizers: Quantizers | None = None,
    straight_through: bool = False,
    **model_kwargs: Any,
) -> Iterator[tuple[int, Any]]:
    """Pairs of a first row and `result(first row, logits)`, which backward computes anew with the chunk."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: a {type(model).__name__} is not allowed; expected a model")
    batch, length = _shape(input_ids)
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        found = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: shape {found} is not allowed; expected {(batch, length)}, as input_ids")
    contexts = _contexts(context_lengths, batch, input_ids.device)
    _check_range("context_lengths", contexts.tolist(), 1, length, "the length")
    _check_range("first_row", [first_row], 0, length - 1, "the last row")
    _check_range("decode_tail", [decode_tail], 0, None, "")
    if chunk_length < 1 or chunk_length % _CHUNK_MULTIPLE:
        raise ValueError(
            f"chunk_length: {chunk_length} is not allowed; expected a positive multiple of {_CHUNK_MULTIPLE}"
        )
    contexts = (contexts - decode_tail).clamp(min=1)
    if kv_config == DENSE:
        cache = DynamicCache(config=model.config)
    else:
        padding = None if attention_mask is None else attention_mask == 0
        cache = _ScoringCache(model, KVQuantConfig.load(kv_config), contexts, padding, quantizers)
    if not all(type(layer) in (_ScoringLayer, DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        chunk_length = length
    per_token = [name for name, x in model_kwargs.items() if isinstance(x, torch.Tensor) and length in x.shape[1:2]]
    if per_token and chunk_length < length:
        raise ValueError(
            f"{per_token[0]}: a value per token cannot be given in chunks; expected chunk_length of at least {length}"
        )
    inputs = (model, input_ids, cache, attention_mask, chunk_length, first_row, model_kwargs)
    return _chunks(result, straight_through, *inputs)


def _chunks(
    result: Callable,
    straight_through: bool,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None,
    chunk_length: int,
    first_row: int,
    model_kwargs: dict,
) -> Iterator[tuple[int, Any]]:
    length = input_ids.shape[1]
    dense = not isinstance(cache, _ScoringCache)
    keeps = takes(model, "logits_to_keep")

    def forward(before: Cache, start: int, end: int, wanted: int) -> tuple[Any, Cache]:
        """The result of one chunk, and the cache after it."""
        cache = before
        if straight_through:
            # The cache before it stays for another pass.
            cache = copy.copy(before)
            cache.layers = [copy.copy(layer) for layer in before.layers]
        inputs = mask_inputs(model, attention_mask, start, end) | model_kwargs
        if keeps and wanted < end - start:
            inputs["logits_to_keep"] = max(wanted, 1)
        if dense and end - start == length:
            inputs["use_cache"] = False
        else:
            inputs |= cache_inputs(model, cache)
        with keeps_caches(model), nullcontext() if dense else attention(model, _attend, name="kvquant-score"):
            logits = model(input_ids[:, start:end], **inputs).logits
        lengths = {layer.length for layer in cache.layers if isinstance(layer, _ScoringLayer)}
        if lengths - {end}:
            raise ValueError(
                f"score: layers hold {lengths} tokens, expected {end}: the model called some without cache"
            )
        return result(end - wanted, logits[:, -wanted:]) if wanted else None, cache

    for start in range(0, length, chunk_length):
        end = min(start + chunk_length, length)
        # The model must see every token, even those whose logits are not wanted; 0 would mean "all".
        wanted = max(end - max(start, first_row), 0)
        chunk = (cache, start, end, wanted)
        if straight_through:
            found, cache = checkpoint(forward, *chunk, use_reentrant=False)
        else:
            with torch.no_grad():
                found, cache = forward(*chunk)
        if wanted:
            yield end - wanted, found


def _shape(input_ids: torch.Tensor) -> tuple[int, int]:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else told(input_ids)
        raise ValueError(f"input_ids: {found} is not allowed; expected a tensor [batch, length] with a token at least")
    return input_ids.shape[0], input_ids.shape[1]


def _contexts(lengths: int | Sequence[int] | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.as_tensor(lengths, device=device).expand(batch)
    except (TypeError, RuntimeError):
        raise ValueError(
            f"context_lengths: {told(lengths)} is not allowed; expected an integer, or one for each of {batch} rows"
        ) from None


def _check_range(name: str, values: Sequence[int], low: int, high: int | None, what: str) -> None:
    if min(values) < low or (high is not None and max(values) > high):
        expected = f"{low} to {high} ({what})" if high is not None else f"{low} or more"
        raise ValueError(f"{name}: {values if len(values) > 1 else values[0]} is not allowed; expected {expected}")


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
            inputs = mask_inputs(model, attention_mask, start, end)
            inputs |= cache_inputs(model, cache)
            logits.append(model(input_ids[:, start:end], **inputs).logits)
    return torch.cat(logits, dim=1)


def mask_inputs(model: PreTrainedModel, attention_mask: torch.Tensor | None, start: int, end: int) -> dict:
    """The arguments about padding for a forward over the positions `start .. end`."""
    if attention_mask is None:
        return {}
    inputs = {"attention_mask": attention_mask[:, :end]}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:end]
    return inputs


def cache_read_share(
    context_lengths: Sequence[int], scored_from: Sequence[int], lengths: Sequence[int], decode_tail: int = 0
) -> float:
    """The share of scored tokens whose logits read the cache; a score with share 0 does not see the cache.

    Token t is predicted by row t - 1, which read the cache iff t - 1 >= context_length (less `decode_tail`, see
    `score`). Row r scores the tokens `scored_from[r] .. lengths[r]`.
    """
    contexts = [max(c - decode_tail, 1) for c in context_lengths]
    read = sum(max(0, n - max(s, c + 1)) for c, s, n in zip(contexts, scored_from, lengths))
    scored = sum(n - s for s, n in zip(scored_from, lengths))
    return read / scored if scored else 0.0


class ScoredStates:
    """Keys or values of one layer for all queries of a chunk at once: exact, `[batch, num_kv_heads, length, head_dim]`
    with all positions up to the chunk's end, and quantized."""

    def __init__(self, exact: torch.Tensor, pieces: Sequence[QuantizedTensor], spec: QuantSpec, layer: _ScoringLayer):
        self.exact, self.pieces, self.spec, self.layer = exact, pieces, spec, layer
        self.sliding_window = layer.sliding_window
        self.shape, self.dtype, self.device = exact.shape, exact.dtype, exact.device
        self.capacity = exact.shape[2]
        self.routes = Routes()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        raise ValueError(
            f"score: {getattr(func, '__name__', func)} changes the cached states before attention; {_REFUSED}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"score: .{name} of the cached states is asked for before attention; {_REFUSED}")

    def position(self, q_len: int) -> int:
        """The position of the first of the newest `q_len` queries."""
        return self.shape[2] - q_len

    def expanded(
        self, module: torch.nn.Module, rotary: ScoredStates, expand: Callable
    ) -> tuple[_ExpandedStates, _ExpandedStates]:
        """Keys and values of every head that a module of latent attention makes of these latents (see `latent`).

        Raises:
            ValueError: the module does something else than the formula there, which decode relies on.
        """
        key, value = expand(self.exact, rotary.exact)
        reason = latent.obstacle_of_expansion(module, self.exact, rotary.exact, key, value)
        if reason is not None:
            raise ValueError(f"score: {reason}; {_REFUSED}")
        stored_key, stored_value = expand(*(states.body(states.dtype) for states in (self, rotary)))
        cut = [module.qk_nope_head_dim, module.qk_rope_head_dim]
        parts = zip(key.split(cut, dim=-1), stored_key.split(cut, dim=-1), (self, rotary))
        return _ExpandedStates(key, tuple(parts)), _ExpandedStates(value, ((value, stored_value, self),))

    def parts(self, dtype: torch.dtype) -> tuple[_Part, ...]:
        """What these states consist of, along head_dim."""
        return ((self.exact.to(dtype), self.body(dtype), self),)

    def read(self, q_len: int) -> NoReturn:
        raise ValueError(f"score: attention needs de-quantized states (see the warning before this); {_REFUSED}")

    def body(self, dtype: torch.dtype) -> torch.Tensor:
        """De-quantized copies of all positions, `[batch, num_kv_heads, length, head_dim]`."""
        exact = self.exact.to(dtype)
        if self.spec.is_dense:
            return exact
        return _StraightThrough.apply(exact, torch.cat([piece.dequantize(dtype) for piece in self.pieces], dim=2))

    def read_exactly(self, start: int, end: int) -> torch.Tensor:
        """Which of all positions the queries at positions `start .. end` read exactly, bool
        `[batch, 1, end - start, length]`."""
        first = torch.tensor([dense_from(i, self.spec, self.layer.recent_length) for i in range(start, end)])
        near = torch.arange(self.shape[2], device=self.device) >= first.to(self.device)[:, None]
        return (near | self._always(start, end))[:, None]

    def _always(self, start: int, end: int) -> torch.Tensor:
        """Which positions the queries at `start .. end` read exactly wherever they are: a query of the context all of
        them, and every query the sinks; bool `[batch, end - start or 1, length]`."""
        layer = self.layer
        in_context = torch.arange(start, end, device=self.device)[:, None] < layer.contexts[:, None, None]
        is_sink = torch.arange(self.shape[2], device=self.device) < layer.sink_length
        if layer.padding is not None:
            token = ~layer.padding[:, : self.shape[2]]
            is_sink = (token & (token.long().cumsum(1) <= layer.sink_length))[:, None]
        return in_context | is_sink

    def evicted(self, start: int, end: int) -> torch.Tensor | None:
        """Which positions the layer has evicted before the queries at `start .. end`, bool as in `read_exactly`; None
        if it evicts none."""
        if self.layer.window_length is None:
            return None
        columns, rows = (torch.arange(*ends, device=self.device) for ends in ((self.shape[2],), (start, end)))
        in_window = columns > rows[:, None] - self.layer.window_length
        return ~(in_window | self._always(start, end))[:, None]


# Exact, de-quantized (both `[batch, num_kv_heads, length, part of head_dim]`), and the states that say which is read.
_Part = tuple[torch.Tensor, torch.Tensor, ScoredStates]


class _ExpandedStates(ScoredStates):
    """Keys or values of every head, expanded from latents and rotary keys."""

    def __init__(self, exact: torch.Tensor, parts: tuple[_Part, ...]):
        super().__init__(exact, (), QuantSpec("dense"), parts[0][2].layer)
        self._parts = parts

    def parts(self, dtype: torch.dtype) -> tuple[_Part, ...]:
        return tuple((exact.to(dtype), stored.to(dtype), states) for exact, stored, states in self._parts)


_REFUSED = "this model cannot be scored in one pass, use score_by_decoding"


class _StraightThrough(torch.autograd.Function):
    """The de-quantized states, with gradients that go to the exact ones."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, dequantized: torch.Tensor) -> torch.Tensor:
        return dequantized.view_as(dequantized)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _attention(
    query: torch.Tensor,
    keys: ScoredStates,
    values: ScoredStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """`reference.decode_attention` for all queries of a chunk, each reading what it would read in decode."""
    batch, num_heads, q_len, _ = query.shape
    num_kv_heads, kv_len = keys.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    k_exact, k_body, k_states = zip(*keys.parts(dtype))
    ((v_exact, v_body, v_states),) = values.parts(dtype)
    n, sizes = len(k_exact), [exact.shape[-1] for exact in k_exact]

    def per_kv_head(x: torch.Tensor) -> torch.Tensor:
        # Query heads that share a KV head become more query rows of it, so keys and values need no copies.
        return x.reshape(batch, num_kv_heads, -1, x.shape[-1])

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch, num_heads, -1, x.shape[-1])

    def part_scores(
        positions: tuple[int, int], query: torch.Tensor, exact: torch.Tensor, body: torch.Tensor, states: ScoredStates
    ) -> torch.Tensor:
        q = per_kv_head(query)
        return torch.where(states.read_exactly(*positions), per_head(q @ exact.mT), per_head(q @ body.mT))

    def rows(start: int, end: int, query: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        k_exact, k_body, (v_exact, v_body) = states[:n], states[n : 2 * n], states[2 * n :]
        positions = start + kv_len - q_len, end + kv_len - q_len
        queries = query[:, :, start:end].to(dtype).split(sizes, dim=-1)
        scores = reduce(torch.add, map(partial(part_scores, positions), queries, k_exact, k_body, k_states)) * scaling
        hidden, bias = mask_rows(mask, start, end, q_len, kv_len, dtype, query.device)
        evicted = keys.evicted(*positions)
        hidden = hidden if evicted is None else hidden | evicted
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = (scores + bias).masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            sinks = s_aux[None, :, None, None] if s_aux.ndim == 1 else s_aux[:, :, start:end]
            scores = torch.cat([scores, sinks.to(dtype).expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(-1)[..., :kv_len].masked_fill(hidden, 0.0)
        exactly = v_states.read_exactly(*positions)
        near, far = weights.masked_fill(~exactly, 0.0), weights.masked_fill(exactly, 0.0)
        return per_head(per_kv_head(near) @ v_exact + per_kv_head(far) @ v_body)

    step = min(max(_MAX_SCORES // (batch * num_heads * kv_len), 1), _MAX_ROWS)
    # Not all scores are kept for backward, either.
    computed = partial(checkpoint, rows, use_reentrant=False) if torch.is_grad_enabled() else rows
    states = (*k_exact, *k_body, v_exact, v_body)
    outputs = [computed(start, min(start + step, q_len), query, *states) for start in range(0, q_len, step)]
    return torch.cat(outputs, dim=2).to(query.dtype)


_attend = partial(attend, states_type=ScoredStates, operator=_attention)


class _ScoringLayer(DynamicLayer):
    """Takes the place of `QuantizedLayer`; keeps every token both exact and quantized."""

    def __init__(
        self,
        specs: tuple[QuantSpec, ...],
        config: KVQuantConfig,
        layer_idx: int,
        contexts: torch.Tensor,
        padding: torch.Tensor | None,
        sliding_window: int | None,
        window_length: int | None,
        quantizers: tuple[Quantizer, Quantizer] | None,
    ):
        super().__init__()
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.window_length = window_length
        self.specs, self.contexts, self.padding, self.quantizers = specs, contexts, padding, quantizers
        self.recent_length, self.sink_length = config.recent_length, config.sink_length
        self.error_feedback, self.layer_idx = config.error_feedback, layer_idx
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.contexts = self.contexts.to(self.device)
        self.padding = None if self.padding is None else self.padding.to(self.device)
        states = key_states, value_states
        keys, values = (spec if spec.is_dense else spec.resolve(x.shape[-1]) for spec, x in zip(self.specs, states))
        self.specs = keys, values
        if self.quantizers is None:
            shapes = tuple((x.shape[1], x.shape[3]) for x in states)
            factors = factors_in(self.error_feedback, self.layer_idx, (keys, values), shapes, self.device)
            self.quantizers = partial(quantize, factors=factors[0]), partial(quantize, factors=factors[1])
        # By update, so that the caches before and after it share them.
        self.exact: tuple[tuple[torch.Tensor, ...], ...] = ((), ())
        self.pieces: tuple[tuple[QuantizedTensor, ...], ...] = ((), ())
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        key_states, value_states = autocast(key_states), autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        padding = None if self.padding is None else self.padding[:, start : self.length]
        states, quantizers = (key_states, value_states), self.quantizers
        assert quantizers is not None
        # Nothing is changed in place: backward needs it as it was.
        self.exact = tuple((*exact, x) for exact, x in zip(self.exact, states))
        self.pieces = tuple(
            pieces if spec.is_dense else (*pieces, stored(x.detach(), spec, padding))
            for pieces, spec, x, stored in zip(self.pieces, self.specs, states, quantizers)
        )
        return tuple(
            ScoredStates(torch.cat(exact, dim=2), pieces, spec, self)
            for exact, pieces, spec in zip(self.exact, self.pieces, self.specs)
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        end = self.length + query_length
        length = mask_length(end, self.sliding_window, query_length)
        return length, end - length


class _ScoringCache(DynamicCache):
    """The layers of a `QuantizedCache`, with a `_ScoringLayer` in place of each quantized one."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: KVQuantConfig,
        contexts: torch.Tensor,
        padding: torch.Tensor | None,
        quantizers: Quantizers | None,
    ):
        # A query reads the same from static storage.
        layers = QuantizedCache(model.config, replace(config, static=False)).layers
        for i, layer in enumerate(layers):
            if isinstance(layer, QuantizedLayer):
                evicts = isinstance(layer, EvictingQuantizedLayer)
                specs = layer.kv_config.for_layer(i)
                arguments = (specs, config, i, contexts, padding, layer.sliding_window)
                window = config.window(i) if evicts else None
                layers[i] = _ScoringLayer(*arguments, window, None if quantizers is None else quantizers(i))
        Cache.__init__(self, layers=layers)
