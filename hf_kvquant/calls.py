"""`Call`: one call of the operator for queries, keys and values that a model has laid out in its own way.

Heads may be merged with the batch, repeated for the query heads that share them (in either order), or stand alone
where all query heads share one. Values may be halves of the cached heads, each for all keys (differential attention),
and columns of the model's own may follow the cached ones (attention to a text and to its source at once): their part
is computed beside the operator, and both are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import axes, ops
from .axes import REPEAT, Dims
from .recorded import Scores, States, Step
from .states import QuantizedStates, widened

# How the operator takes queries and masks, by the names of axes.
QUERY = (("batch",), ("head", REPEAT), ("query",), ("channel",))
MASK = (("batch",), ("head", REPEAT), ("query",), ("column",))


def lead(sizes: Sequence[int], dims: Dims, grouped: bool = False) -> Dims | None:
    """Batch and heads of queries `sizes`, given those of keys or values, which broadcast against them; `grouped`: as
    many query heads as divide them evenly may follow each KV head."""
    if len(sizes) < len(dims):
        return None
    dims = ((),) * (len(sizes) - len(dims)) + dims
    found = []
    for i, (n, own, dim) in enumerate(zip(sizes, axes.shape(dims), dims)):
        if n == own:
            found.append(dim)
        elif own == 1 or (grouped and i == len(dims) - 1 and n % own == 0):
            found.append((*dim, (REPEAT, n // own)))
        else:
            return None
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Call:
    """A query of `query_dims` that attends to the states of a step; its mask broadcasts against `mask_dims`.

    Args:
        parts: the keys' heads are cut into this number of parts, each with the values' heads `value_heads`.
        more: keys and values `[batch, num_kv_heads, more columns, head_dim]` behind the cached ones.
    """

    step: Step
    query_dims: Dims
    mask_dims: Dims
    output_dims: Dims
    parts: int = 1
    value_heads: tuple[int, int] | None = None
    more: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def of(sizes: Sequence[int], keys: object, values: object, grouped: bool = False) -> Call | None:
        """The call for a query of these sizes and the meanings of keys and values `[.., columns, head_dim]`; None: the
        operator does not compute what the model would."""
        if not isinstance(keys, States) or not keys.is_keys or keys.heads is not None or len(keys.dims) < 3:
            return None
        step, (columns, channel) = keys.step, keys.dims[-2:]
        more = keys.more
        width = step.columns + (0 if more is None else more.shape[2])
        if columns != (("column", width),) or channel != (("channel", step.keys.head_dim),):
            return None
        heads = lead(sizes[:-2], keys.dims[:-2], grouped)
        if heads is None or tuple(sizes[-2:]) != (step.q_len, step.keys.head_dim):
            return None
        (row,) = axes.named(query=step.q_len)
        return Call._weighing(step, (*heads, row, channel), (*heads, row, columns), values, grouped, more)

    @staticmethod
    def of_weights(scores: Scores, dims: Dims, values: object) -> Call | None:
        """The call for the softmax of scores, laid out as `dims`."""
        return Call._weighing(scores.step, scores.query_dims, dims, values, False, None)

    @staticmethod
    def _weighing(
        step: Step, query_dims: Dims, weights: Dims, values: object, grouped: bool, more_keys: torch.Tensor | None
    ) -> Call | None:
        if not isinstance(values, States) or values.is_keys or values.step is not step or len(weights) < 2:
            return None
        *heads, row, columns = weights
        if len(values.dims) - 2 > len(heads) or row != axes.named(query=step.q_len)[0]:
            return None
        if values.dims[-2:] != (columns, (("channel", step.values.head_dim),)):
            return None
        more = None
        if more_keys is not None or values.more is not None:
            if more_keys is None or values.more is None or values.heads is not None:
                return None
            more = more_keys, values.more
        parts = 1
        own = ((),) * (len(heads) - len(values.dims) + 2) + values.dims[:-2]
        for i, (head, dim) in enumerate(zip(heads, own)):
            shared = grouped and i == len(heads) - 1
            without = head[:-1] if shared and head[len(dim) :] and head[-1][0] == REPEAT else head
            if values.heads is not None and dim and dim[0][0] == REPEAT:
                # Values of a part of the heads, repeated for all keys.
                parts, part, own_heads = dim[0][1], values.heads[1] - values.heads[0], step.keys.shape[1]
                is_all = head[:1] == (("head", own_heads),) and parts * part == own_heads
                if not is_all or dim[1:] != axes.named(head=part)[0]:
                    return None
            elif dim not in (head, without) and not (dim == () and all(name == REPEAT for name, _ in head)):
                return None
        if (values.heads is None) != (parts == 1):
            return None
        output = (*heads, row, values.dims[-1])
        return Call(step, query_dims, weights, output, parts, values.heads, more)

    @property
    def columns(self) -> int:
        """How many columns of the mask are cached ones."""
        return self.step.columns

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask or a bias of the model as the operator takes it."""
        return axes.arrange(mask, self.mask_dims, MASK)

    def _stored(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of the model's columns for all stored ones; a sliding layer has some before them."""
        return widened(mask, self.step.keys, self.step.q_len)

    def per_head(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers `[num_heads]` in the operator's order of heads."""
        return self.mask(x[:, None, None]).flatten()

    def __call__(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None = None,
        s_aux: torch.Tensor | None = None,
        *,
        scaling: float,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """The output, laid out as the model awaits it; the arguments are those of `ops.decode_attention`, but for the
        layout of the query, and for the mask, which has all columns."""
        self.step.keys.routes.count("decode_fused")
        self.step.is_used = True
        query = axes.arrange(query, self.query_dims, QUERY).to(self.step.keys.dtype)
        options = {"scaling": scaling, "softcap": softcap}
        if self.more is not None:
            output = self._merged(query, mask, s_aux, **options)
        elif self.parts > 1:
            output = self._in_parts(query, self._stored(mask), s_aux, **options)
        else:
            keys, values = self.step.keys, self.step.values
            output = ops.decode_attention(query, keys, values, self._stored(mask), s_aux, **options)[0]
        return axes.restore(output, QUERY, self.output_dims)

    def _in_parts(
        self, query: torch.Tensor, mask: torch.Tensor | None, s_aux: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        heads, outputs = query.shape[1] // self.parts, []
        kv_heads = self.step.keys.shape[1] // self.parts
        values = _of_heads(self.step.values, *self.value_heads)
        for i in range(self.parts):
            keys = _of_heads(self.step.keys, i * kv_heads, (i + 1) * kv_heads)
            own = slice(i * heads, (i + 1) * heads)
            has_heads = mask is not None and mask.ndim == 4 and mask.shape[1] > 1
            outputs.append(
                ops.decode_attention(
                    query[:, own], keys, values, mask[:, own] if has_heads else mask,
                    None if s_aux is None else s_aux[own], **options,
                )[0]
            )  # fmt: skip
        return torch.cat(outputs, dim=1)

    def _merged(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        s_aux: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float,
    ) -> torch.Tensor:
        """Attention to the cached columns and to the model's own: a softmax over both is the mean of two, weighted by
        the sums of their exponentials."""
        cached = self._stored(None if mask is None else mask[..., : self.columns])
        keys, values = self.step.keys, self.step.values
        output, logsumexp = ops.decode_attention(query, keys, values, cached, s_aux, scaling=scaling, softcap=softcap)
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, num_heads, q_len, _ = query.shape
        num_kv_heads = keys.shape[1]
        more_keys, more_values = (x.to(dtype) for x in self.more)
        grouped = query.to(dtype).reshape(batch, num_kv_heads, -1, query.shape[-1])
        scores = (grouped @ more_keys.mT).reshape(batch, num_heads, q_len, -1) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            mask = mask[..., self.columns :]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = torch.where(mask <= torch.finfo(mask.dtype).min, -torch.inf, scores + mask)
        more_logsumexp = scores.logsumexp(-1)
        weights = (scores - more_logsumexp[..., None].clamp(min=torch.finfo(dtype).min)).exp()
        more = weights.reshape(batch, num_kv_heads, -1, weights.shape[-1]) @ more_values
        more = more.reshape(*query.shape[:3], -1)
        # Rows that see nothing at all are zero, as the operator has it.
        share = (logsumexp - torch.logaddexp(logsumexp.to(dtype), more_logsumexp)).exp().nan_to_num(0.0)[..., None]
        return (output.to(dtype) * share + more * (1 - share)).to(query.dtype)


def _of_heads(states: QuantizedStates, start: int, end: int) -> QuantizedStates:
    """Some KV heads, as views."""
    return replace(states, stored=states.stored.transformed(lambda tensor: tensor[:, start:end]))
