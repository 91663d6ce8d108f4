"""Error feedback, a prototype that only measures: codes on the channel grid that lose less, read as any others are.

    feedback = Feedback.of(model, text)      # one pass over calibration text, token ids [pieces, length]
    compare(model, documents, [Compensated("feedback-4", config, feedback)], settings, facts)

Attention reads a key through products with queries, and a value through the output projection. So an error e of a
token's key costs about e H e, where H is the second moment of the queries of its KV head, and that of a value the
same with H = W W' of the projection's columns W of these heads. Rounding a channel can make up for the errors of those
before it: channels are rounded one after another, and what the error of one costs is taken from the others (GPTQ,
https://arxiv.org/abs/2210.17323; LDLQ in QuIP, https://arxiv.org/abs/2307.13304; there for weights). Scales come
from the channels as they are when their turn comes. Codes, scales and zero points are read as always, so the kernels
of attention would stay.

The cache has a simpler one, `hf_kvquant/feedback.py`. This one also orders channels by cost, and fits scales and zero
points to the codes of values; `eval/results/NOTES.md` says what that gains.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention import attend
from ..config import KVQuantConfig
from ..integration import attention
from ..quantization import FORMATS, QuantSpec
from .caches import Preset, one_pass
from .schemes import ReadBack, fp16

# Added to the diagonal of H, as a part of its mean, so that no direction counts nothing.
_DAMPING = 0.01
# Of values. Keys lose by it: the tokens that are attended to from afar often have the extremes of a channel.
_REFITS = 2
# By layer: the second moments of its queries, and its output projection, `[num_kv_heads, head_dim, head_dim]` each.
_costs: ContextVar[dict[int, list[torch.Tensor]]] = ContextVar("costs")


@dataclass(frozen=True)
class Order:
    """How the errors of one side's channels, which are rounded in order of falling cost, spread to later ones.

    order      int64 `[num_kv_heads, head_dim]`: the channels
    factors    float32 `[num_kv_heads, head_dim, head_dim]`, upper triangular: what a unit of error of the i-th channel
               takes from the j-th
    """

    order: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, cost: torch.Tensor) -> Order:
        """For the costs H, `[num_kv_heads, head_dim, head_dim]`."""
        cost = cost.double()
        diagonal = cost.diagonal(dim1=-2, dim2=-1)
        cost = cost + torch.diag_embed(_DAMPING * diagonal.mean(-1, keepdim=True).expand_as(diagonal))
        order = diagonal.argsort(-1, descending=True)
        rows = cost.gather(1, order[..., None].expand_as(cost))
        inverse = torch.linalg.inv(rows.gather(2, order[:, None].expand_as(cost)))
        factors = torch.linalg.cholesky(inverse, upper=True)
        return cls(order, (factors / factors.diagonal(dim1=-2, dim2=-1)[..., None]).float())


@dataclass(frozen=True)
class Feedback:
    """The orders of keys and of values of each layer."""

    layers: dict[int, tuple[Order, Order]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, text: torch.Tensor) -> Feedback:
        """Measured on token ids `[pieces, length]`, of a model whose attention modules have an `o_proj`."""
        costs: dict[int, list[torch.Tensor]] = {}
        token = _costs.set(costs)
        try:
            with attention(model, _noting, name="kvquant-moments"):
                for ids in text.split(1):
                    model(ids, use_cache=False)
        finally:
            _costs.reset(token)
        return cls({i: (Order.of(queries), Order.of(output)) for i, (queries, output) in costs.items()})


def _noting(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that adds to `_costs`."""
    num_kv_heads, head_dim = key.shape[1], value.shape[-1]
    q = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, -2).float()
    w = module.o_proj.weight.float().mT.reshape(num_kv_heads, -1, head_dim, module.o_proj.weight.shape[0])
    found = [q.mT @ q, (w @ w.mT).sum(1)]
    known = _costs.get().get(module.layer_idx)
    _costs.get()[module.layer_idx] = found if known is None else [a + b for a, b in zip(known, found)]
    return attend(module, query, key, value, *args, **kwargs)


class Compensated(Preset):
    """A candidate of `compare`: a config with both sides on the channel grid, encoded with feedback."""

    kind = "peer"

    def __init__(self, name: str, config: KVQuantConfig, feedback: Feedback):
        super().__init__(name, config)
        self.feedback = feedback

    def rows(self, model, ids, context, first):
        yield one_pass(model, ids, context, self.config, first, quantizers=self._quantizers)

    def _quantizers(self, layer_idx: int) -> tuple[Any, Any]:
        keys, values = self.feedback.layers[layer_idx]
        return (
            lambda x, spec, _: ReadBack(stored(x.float(), spec, keys)),
            lambda x, spec, _: ReadBack(stored(x.float(), spec, values, _REFITS)),
        )


def stored(x: torch.Tensor, spec: QuantSpec, order: Order | None, refits: int = 0) -> torch.Tensor:
    """States `[1, num_kv_heads, length, head_dim]` as a cache on the channel grid reads them back.

    Args:
        order: the feedback; None: none.
        refits: how often a channel's scale and zero point are fitted to its codes by least squares, if that helps.
    """
    length, whole = spec.block_length, x.shape[2] // spec.block_length * spec.block_length
    blocks = [x[:, :, :whole].unflatten(2, (-1, length))] if whole else []
    if whole < x.shape[2]:
        blocks.append(x[:, :, None, whole:])
    return torch.cat([_blocks(part[0].mT, spec, order, refits).mT.flatten(1, 2)[None] for part in blocks], dim=2)


def _blocks(x: torch.Tensor, spec: QuantSpec, order: Order | None, refits: int) -> torch.Tensor:
    """The same for `[num_kv_heads, blocks, head_dim, block_length]`."""
    if order is None:
        return rounded(x, spec, refits)
    places = order.order[:, None, :, None].expand_as(x)
    x, found = x.gather(2, places), torch.empty_like(x)
    for i in range(x.shape[2]):
        channel = x[:, :, i]
        found[:, :, i] = rounded(channel, spec, refits)
        error = channel - found[:, :, i]
        x[:, :, i + 1 :] -= order.factors[:, None, i, i + 1 :, None] * error[:, :, None]
    return torch.empty_like(found).scatter(2, places, found)


def rounded(x: torch.Tensor, spec: QuantSpec, refits: int) -> torch.Tensor:
    """Elements `[.., tokens]` with a scale and a zero point for all tokens, read back."""
    form = FORMATS[spec.format]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    margin = (high - low) * ((1 - form.channel_span) / 2)
    zero = fp16(low + margin)
    scale = fp16((high - margin - zero) / form.levels)

    def codes() -> torch.Tensor:
        return ((x - zero) / torch.where(scale != 0, scale, 1.0)).round().clamp(0, form.levels)

    found = zero + codes() * scale
    for _ in range(refits):
        far = codes() - codes().mean(-1, keepdim=True)
        spread = far.square().sum(-1, keepdim=True)
        scale = torch.where(spread > 0, fp16((far * x).sum(-1, keepdim=True) / spread.clamp(min=1e-9)), scale)
        zero = fp16((x - codes() * scale).mean(-1, keepdim=True))
        again = zero + codes() * scale
        closer = (again - x).square().sum(-1, keepdim=True) < (found - x).square().sum(-1, keepdim=True)
        found = torch.where(closer, again, found)
    return found
