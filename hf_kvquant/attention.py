"""The attention function that models call while a quantized cache is in use.

A tensor goes to the model's own (dense) attention, `QuantizedStates` to the operator. A call that the operator cannot
do goes to dense attention over de-quantized states; such calls are counted, and the first one warns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import axes, latent, ops
from .calls import Call
from .host import CACHE_NAMES, asks_for_weights
from .recorded import RecordedStates
from .route import KEEPS_WEIGHTS, learn_route, say_dequantized
from .states import Kept, QuantizedStates, autocast, complete_mask, hides_columns, is_autocast, mask_length, widened

# Arguments that do not change what decode attention computes.
_HARMLESS = frozenset({
    "dropout", "scaling", "softcap", "s_aux", "sinks", "position_bias", "is_causal", "output_attentions",
    "sliding_window", "position_ids", "cache_position", "use_cache", "output_hidden_states",
    "output_router_logits", "return_dict", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep", "labels",
    "deterministic", *CACHE_NAMES,
})  # fmt: skip


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    *,
    dense_attention: Callable,
    states_type: type[Any] = QuantizedStates,
    operator: Callable | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the signature of transformers' attention functions.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`.
        key, value: the return values of `cache.update`, perhaps changed by the model.
        dense_attention: the model's own attention function; takes the same arguments.
        states_type, operator: the type of cached states that are attended to as stored, and the function that does it.

    Returns:
        `[batch, q_len, num_heads, v_head_dim]`, and attention weights or None.
    """
    if isinstance(key, latent.LatentStates):
        return _attend_latents(module, query, key, value, attention_mask, dense_attention, kwargs)
    whole_mask = attention_mask
    attention_mask = _of_columns(attention_mask, key, query.shape[2], kwargs)
    call = None
    if isinstance(key, RecordedStates) and isinstance(value, RecordedStates):
        if key.meaning.is_as_stored and value.meaning.is_as_stored:
            key, value = key.meaning.step.take()
        else:
            call = Call.of(query.shape, key.meaning, value.meaning, grouped=True)
    if call is None and not isinstance(key, states_type):
        key, value = learn_route(key, value)
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    states = key if call is None else call.step.keys
    same_type = call is not None or type(value) is type(key)
    # Another function than the compiled operator may have gradients.
    has_gradients = operator is not None
    obstacle = _obstacle(module, query, states, same_type, key, attention_mask, kwargs, has_gradients)
    if call is not None and obstacle is None:
        obstacle = _obstacle_of_call(call, query.shape[2], attention_mask, kwargs)
    if obstacle is not None:
        if call is not None:
            key, value = (x.numbers(obstacle) for x in (key, value))
            return dense_attention(module, query, key, value, attention_mask, **kwargs)
        if not torch.compiler.is_compiling():
            say_dequantized(obstacle)
        key.routes.count("decode_dequantized")
        if isinstance(states, QuantizedStates) and states.device_length is not None:
            attention_mask = whole_mask
        key, value = (s.read(query.shape[2]) if isinstance(s, states_type) else s for s in (key, value))
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if call is None and states.sliding_window is not None:
        attention_mask = widened(attention_mask, states, query.shape[2])
    if kwargs.get("position_bias") is not None:
        attention_mask = _join(kwargs["position_bias"], attention_mask, states, query.shape[2])
    options = {"scaling": float(scaling), "softcap": float(kwargs.get("softcap") or 0.0)}
    s_aux = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    in_autocast = is_autocast(query)
    if in_autocast:
        query = query.to(states.dtype)
    if call is None:
        key.routes.count("decode_fused")
        output = (operator or _decode)(query, key, value, attention_mask, s_aux, **options)
    else:
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = call.mask(attention_mask)
        output = call(query, attention_mask, None if s_aux is None else call.per_head(s_aux), **options)
    if in_autocast:
        output = autocast(output)
    return output.transpose(1, 2).contiguous(), None


def _attend_latents(
    module: torch.nn.Module,
    query: torch.Tensor,
    states: latent.LatentStates,
    value: Any,
    mask: torch.Tensor | None,
    dense_attention: Callable,
    kwargs: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` for the stored latents of multi-head latent attention (see `latent`)."""
    latents, q_len = states.latents, query.shape[2]
    mask = _of_columns(mask, latents, q_len, kwargs)
    same_type = isinstance(value, latent.LatentStates)
    obstacle = _obstacle(module, query, latents, same_type, latents, mask, kwargs)
    obstacle = obstacle or latent.obstacle_of(states, query, kwargs)
    if obstacle is not None:
        if not torch.compiler.is_compiling():
            say_dequantized(obstacle)
        latents.routes.count("decode_dequantized")
        key, expanded = states.read(q_len)
        value = expanded if same_type else value
        return dense_attention(module, query, key, value, mask, **kwargs)
    latents.routes.count("decode_fused")
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mask = widened(mask, latents, q_len)
    output = latent.attend(module, query, states, mask, kwargs.get("s_aux"), scaling=scaling)
    return output.transpose(1, 2).contiguous(), None


def _decode(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """The operator, which takes learned sinks `[num_heads]`; those of each query `[batch, num_heads, q_len, 1]` are
    one more column of weight and no value, which shrinks the output."""
    if s_aux is None or s_aux.ndim == 1:
        return ops.decode_attention(query, keys, values, mask, s_aux, **options)[0]
    output, logsumexp = ops.decode_attention(query, keys, values, mask, **options)
    return (output * torch.sigmoid(logsumexp[..., None] - s_aux.to(logsumexp.dtype))).to(query.dtype)


def _obstacle_of_call(call: Call, q_len: int, mask: torch.Tensor | None, kwargs: dict) -> str | None:
    """Why the operator cannot do this call for states that the model has laid out in its own way, or None."""
    if kwargs.get("sinks") is not None:
        return "the attention argument 'sinks'"
    if mask is not None and mask.ndim == 4 and not axes.broadcasts(mask.shape, call.mask_dims):
        return f"a mask of shape {tuple(mask.shape)}"
    has_no_mask_for_both = q_len > 1 if mask is None else mask.ndim != 4
    if call.more is not None and has_no_mask_for_both:
        return "cached states with others behind them, without a mask for both"
    if kwargs.get("position_bias") is not None and call.columns != call.step.keys.length:
        return "the attention argument 'position_bias' over a sliding window"
    return None


def _obstacle(
    module: torch.nn.Module,
    query: torch.Tensor,
    states: QuantizedStates,
    same_type: bool,
    key: Any,
    mask: object,
    kwargs: dict,
    has_gradients: bool = False,
) -> str | None:
    """The reason why the operator cannot do this call, or None."""
    if not same_type:
        return "values that are not cached as the keys are"
    if kwargs.get("output_attentions") or asks_for_weights(module):
        return KEEPS_WEIGHTS
    if query.requires_grad and torch.is_grad_enabled() and not has_gradients:
        return "queries that require grad"
    if kwargs.get("dropout"):
        return f"dropout={kwargs['dropout']}"
    if mask is not None and not isinstance(mask, torch.Tensor):
        return f"a mask of type {type(mask).__name__}"
    is_causal = mask is None or mask.ndim == 2
    window = kwargs.get("sliding_window")
    if window is not None and states.sliding_window is None and hides_columns(window, key.shape[2]) and is_causal:
        return f"sliding_window={window}"
    if kwargs.get("is_causal") is False and query.shape[2] > 1 and is_causal:
        return "is_causal=False"
    sinks = kwargs.get("sinks")
    if sinks is not None and (sinks.ndim != 4 or tuple(sinks.shape[1:]) != (*query.shape[1:3], 1)):
        return f"sinks of shape {tuple(sinks.shape)}"
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS:
            return f"the attention argument {name!r}"
    return None


def _of_columns(mask: Any, key: Any, q_len: int, kwargs: dict) -> Any:
    """The columns of the mask that the states have. The mask of a static cache is as wide as all of its tokens; the
    states have only the columns in use, if these are known, and those of a sliding layer begin later. The operator, or
    dense attention, raises for any other width that does not fit."""
    kept = getattr(key, "kept", None)
    if kept is not None:
        return _of_kept(mask, key, kept, q_len, kwargs)
    if not isinstance(mask, torch.Tensor):
        return mask
    kv_len = key.shape[2]
    if getattr(key, "mask_width", None) is None:
        return mask[..., :kv_len] if mask.shape[-1] == getattr(key, "capacity", None) else mask
    if isinstance(key.dropped, torch.Tensor):
        columns = torch.arange(kv_len, device=mask.device) + key.dropped
        return mask.index_select(-1, columns.clamp(max=mask.shape[-1] - 1))
    end = key.dropped + kv_len
    return mask[..., end - mask_length(kv_len, key.sliding_window, q_len) : end]


def _of_kept(mask: Any, key: Any, kept: Kept, q_len: int, kwargs: dict) -> torch.Tensor | None:
    """The mask for the columns of a layer that has evicted tokens, complete if a window hides some of them.

    Raises:
        ValueError: attention depends on positions in a way that its arguments do not say by column.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"window_length: {kept.window} tokens cannot be the window of attention with a position bias (T5); "
            "expected 'all'"
        )
    kv_len = key.shape[2]
    if mask is not None:
        width = kept.start + kv_len - kept.front
        if not isinstance(mask, torch.Tensor) or mask.shape[-1] != width:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask: {shape} does not fit a layer that has evicted tokens; expected {width} columns")
        is_additive = mask.ndim == 4 and mask.is_floating_point()
        mask = torch.nn.functional.pad(mask[..., kept.start :], (kept.front, 0), value=0 if is_additive else 1)
    columns = torch.arange(kv_len, device=key.device)
    seen = columns >= kept.front
    is_sink = key.is_sink() if kept.is_sink is None else kept.is_sink
    if kept.window is None:
        seen = seen | is_sink
        if mask is None:
            return None if seen.all() else seen
        if mask.ndim == 2:
            return mask * seen
        seen = seen[:, None, None]
    else:
        positions = columns[-q_len:, None]
        seen = ((seen & (columns > positions - kept.window)) | is_sink[:, None])[:, None]
        if mask is None or mask.ndim == 2:
            seen = seen & (columns <= positions)
            return seen if mask is None else seen & (mask != 0)[:, None, None]
    return torch.where(seen, mask, torch.finfo(mask.dtype).min) if is_additive else mask & seen


def _join(position_bias: torch.Tensor, mask: torch.Tensor | None, key: QuantizedStates, q_len: int) -> torch.Tensor:
    """A bias (T5, or Inkling's, for the columns in the window) and a mask for all stored columns as one additive mask
    `[batch or 1, num_heads, q_len, kv_len]`."""
    lowest = torch.finfo(position_bias.dtype).min
    hidden_columns = key.shape[2] - mask_length(key.shape[2], key.sliding_window, q_len)
    if hidden_columns and position_bias.shape[-1] == key.shape[2] - hidden_columns:
        position_bias = torch.nn.functional.pad(position_bias, (hidden_columns, 0))
    if mask is None or mask.ndim == 2:
        mask = complete_mask(mask, key, q_len)
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, lowest)
    hidden = mask <= torch.finfo(mask.dtype).min
    return torch.where(hidden, lowest, position_bias + mask)
