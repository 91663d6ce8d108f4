"""`calibrate`: the factors of error feedback for a model, in one pass over some text.

    feedback = hf_kvquant.calibrate(model, token_ids)
    feedback.save("model.feedback")

`feedback` says what they are. The text should be like that in use, and not the one that a config is judged by.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch

from .attention import attend
from .feedback import Feedback, factors_of
from .integration import attention
from .message import told

# The names under which models keep the projection that follows attention.
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# By layer: the second moments of its queries, and its output projection, `[num_kv_heads, head_dim, head_dim]` each.
_costs: ContextVar[dict[int, tuple[torch.Tensor, torch.Tensor]]] = ContextVar("costs")


@torch.no_grad()
def calibrate(model: Any, token_ids: Iterable[torch.Tensor]) -> Feedback:
    """Measure the costs of errors of keys and of values, and make the factors of error feedback of them.

    Args:
        model: a decoder of transformers.
        token_ids: pieces of text: a tensor `[pieces, length]`, or tensors `[length]` one after another. Some thousands
            of tokens are enough.

    Returns:
        Factors for every layer whose attention modules call transformers' attention interface.

    Raises:
        ValueError: a piece is not a tensor of tokens; the model has latent attention or an encoder, no such layer, or
            a module whose output projection is not found; or a cost is not finite. The module or layer is named.

    Sources: GPTQ, https://arxiv.org/abs/2210.17323; LDLQ in QuIP, https://arxiv.org/abs/2307.13304.
    """
    config = model.config.get_text_config(decoder=True)
    if isinstance(getattr(config, "kv_lora_rank", None), int):
        raise ValueError(
            f"kv_lora_rank: {config.kv_lora_rank}: latent attention caches latents, whose costs are not measured; "
            "expected a model that caches keys and values"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("is_encoder_decoder: True is not allowed; expected a decoder")
    costs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    token = _costs.set(costs)
    try:
        with attention(model, _noting, name="kvquant-calibrate"):
            for ids in token_ids:
                if not isinstance(ids, torch.Tensor) or ids.ndim != 1 or ids.is_floating_point() or not len(ids):
                    found = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, torch.Tensor) else told(ids)
                    raise ValueError(f"token_ids: a piece that is {found} is not allowed; expected tokens [length]")
                model(ids[None].to(model.device), use_cache=False)
    finally:
        _costs.reset(token)
    if not costs:
        raise ValueError(
            f"{type(model).__name__}: no layer was measured; expected attention modules that call transformers' "
            "attention interface, and text"
        )
    for layer_idx, cost in costs.items():
        if not all(x.isfinite().all() for x in cost):
            raise ValueError(f"layer {layer_idx}: its queries or output projection have a NaN or infinity")
    return Feedback({i: (factors_of(queries), factors_of(output)) for i, (queries, output) in sorted(costs.items())})


def _noting(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that adds to `_costs`."""
    costs, num_kv_heads = _costs.get(), key.shape[1]
    q = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, -2).float()
    moments = (q.mT @ q).double()
    if module.layer_idx in costs:
        queries, output = costs[module.layer_idx]
        costs[module.layer_idx] = queries + moments, output
    else:
        costs[module.layer_idx] = moments, _output_cost(module, query, value)
    return attend(module, query, key, value, *args, **kwargs)


def _output_cost(module: Any, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The second moments of the output projection's columns, `[num_kv_heads, head_dim, head_dim]`.

    Its matrix is read through the module, so that adapters, quantized weights and either order of axes are right.
    """
    width, (_, num_kv_heads, _, head_dim) = query.shape[1] * value.shape[3], value.shape
    found = [name for name in PROJECTIONS if isinstance(getattr(module, name, None), torch.nn.Module)]
    unit = torch.eye(width, dtype=query.dtype, device=query.device)
    try:
        (name,) = found
        projection = getattr(module, name)
        rows = (projection(unit) - projection(torch.zeros_like(unit[:1]))).float()
    except (RuntimeError, ValueError) as error:
        reason = f" ({error})" if len(found) == 1 else ""
        raise ValueError(
            f"layer {module.layer_idx}: {type(module).__name__} has output projections {found}{reason}; expected one "
            f"of {list(PROJECTIONS)} that takes {width} channels"
        ) from None
    w = rows.unflatten(0, (num_kv_heads, -1, head_dim))
    return torch.einsum("hgio,hgjo->hij", w, w).double()
