"""The attention function that models call while a quantized cache is in use.

A tensor goes to the model's own (dense) attention, `QuantizedStates` to the operator. What the operator cannot do goes
to dense attention over de-quantized states, said once and counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import ops
from .route import learn_route, say_once
from .states import QuantizedStates

# Arguments that do not change what decode attention computes.
_HARMLESS = frozenset({
    "dropout", "scaling", "softcap", "s_aux", "position_bias", "is_causal", "output_attentions", "sliding_window",
    "position_ids", "cache_position", "use_cache", "past_key_values", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep", "labels", "deterministic",
})  # fmt: skip


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | QuantizedStates,
    value: torch.Tensor | QuantizedStates,
    attention_mask: torch.Tensor | None,
    *,
    dense_attention: Callable,
    states_type: type = QuantizedStates,
    operator: Callable | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the signature of transformers' attention functions.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`.
        key, value: what `cache.update` returned, perhaps changed by the model.
        dense_attention: the model's own attention function; takes the same arguments.
        states_type, operator: the value that stands for cached states, and what attends to it.

    Returns:
        `[batch, q_len, num_heads, v_head_dim]`, and attention weights or None.
    """
    if not isinstance(key, states_type):
        key, value = learn_route(key, value)
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    obstacle = _obstacle(module, query, type(value) is type(key), attention_mask, kwargs)
    if obstacle is None and operator is None and _looks_ahead(attention_mask, query.shape[2]):
        obstacle = f"a mask that looks ahead in an update of more than {ops.MAX_Q_LEN} tokens"
    if obstacle is not None:
        say_once(f"Attention reads de-quantized copies of the KV cache, because of {obstacle}.")
        key.routes["decode_dequantized"] += 1
        first = key.shape[2] - query.shape[2]
        key, value = (s.dequantize(position=first) if isinstance(s, states_type) else s for s in (key, value))
        return dense_attention(module, query, key, value, attention_mask, **kwargs)
    key.routes["decode_fused"] += 1
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if kwargs.get("position_bias") is not None:
        attention_mask = _join(kwargs["position_bias"], attention_mask, query.shape[2], key.shape[2])
    softcap = float(kwargs.get("softcap") or 0.0)
    operator = operator or _decode
    output = operator(query, key, value, attention_mask, kwargs.get("s_aux"), scaling=float(scaling), softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


def _decode(
    query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates, mask, s_aux, **options
) -> torch.Tensor:
    """`ops.decode_attention` for any q_len, in parts of at most `ops.MAX_Q_LEN` queries."""
    q_len, outputs = query.shape[2], []
    for start in range(0, q_len, ops.MAX_Q_LEN):
        part = query[:, :, start : start + ops.MAX_Q_LEN]
        end = start + part.shape[2]
        length = keys.length - q_len + end
        rows = _rows(mask, start, end, length)
        states = keys.shortened(length), values.shortened(length)
        outputs.append(ops.decode_attention(part, *states, rows, s_aux, **options)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _obstacle(module, query: torch.Tensor, same_type: bool, mask, kwargs: dict) -> str | None:
    """Why the operator cannot do this call, or None."""
    if not same_type:
        return "values that are not cached as the keys are"
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return "output_attentions=True (attention weights exist only in dense attention)"
    if query.requires_grad and torch.is_grad_enabled():
        return "queries that require grad"
    if kwargs.get("dropout"):
        return f"dropout={kwargs['dropout']}"
    if kwargs.get("sliding_window") is not None:
        return f"sliding_window={kwargs['sliding_window']}"
    if mask is not None and not isinstance(mask, torch.Tensor):
        return f"a mask of type {type(mask).__name__}"
    if kwargs.get("is_causal") is False and query.shape[2] > 1 and (mask is None or mask.ndim == 2):
        return "is_causal=False"
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    return f"the attention argument {unknown[0]!r}" if unknown else None


def _looks_ahead(mask: torch.Tensor | None, q_len: int) -> bool:
    """Whether a query sees keys of a later part of the update (see `_decode`), as in prefix or image attention."""
    if mask is None or mask.ndim == 2 or q_len <= ops.MAX_Q_LEN:
        return False
    later = mask[:, :, : ops.MAX_Q_LEN, mask.shape[-1] - q_len + ops.MAX_Q_LEN :]
    return bool((later if later.dtype == torch.bool else later > torch.finfo(later.dtype).min).any())


def _rows(mask: torch.Tensor | None, start: int, end: int, length: int) -> torch.Tensor | None:
    """The mask of the queries `start .. end`, whose newest key is column `length - 1`."""
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[2] > 1:
        mask = mask[:, :, start:end]
    return mask[..., :length]


def _join(position_bias: torch.Tensor, mask: torch.Tensor | None, q_len: int, kv_len: int) -> torch.Tensor:
    """One additive mask `[batch or 1, num_heads, q_len, kv_len]` of a bias and a mask (T5)."""
    lowest = torch.finfo(position_bias.dtype).min
    if mask is None or mask.ndim == 2:
        columns = torch.arange(kv_len, device=position_bias.device)
        seen = columns <= columns[kv_len - q_len :, None]
        mask = seen[None, None] if mask is None else seen & (mask != 0)[:, None, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, lowest)
    hidden = mask <= torch.finfo(mask.dtype).min
    return torch.where(hidden, lowest, position_bias + mask)
