"""`decode_attention` and `quantize_append` in plain PyTorch, float32. They define what is correct; they are slow.

Every backend is tested against these two functions. With float64 queries they compute in float64, for exact
comparisons. `retire` moves bytes only, and serves every device.
"""

from __future__ import annotations

import torch

from .quantization import NO_FACTORS, Factors, check_factors, quantize
from .states import PagedStates, QuantizedStates, Stored


def decode_attention(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest queries over quantized keys and values.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`; query j is at position `kv_len - q_len + j`.
        keys, values: states of the same length `kv_len`. If it is on the device, a mask is as wide as its limit.
        mask: None or `[batch, kv_len]` (non-zero: attend), both with causal order; or a complete mask `[batch or 1,
            num_heads or 1, q_len or 1, kv_len]`, bool (True: attend), or additive, where values at or below
            `finfo(mask.dtype).min` hide.
        s_aux: learned sink logits `[num_heads]`, one more column of the scores, without a value.
        scaling: factor of the scores.
        softcap: 0, or scores become `softcap * tanh(scores / softcap)`.

    Returns:
        Output `[batch, num_heads, q_len, v_head_dim]` in the query's dtype, and the log-sum-exp of the scores, float32
        `[batch, num_heads, q_len]`. A row whose mask hides every key returns zeros.
    """
    batch, num_heads, q_len, _ = query.shape
    keys, values = keys.known(), values.known()
    kv_len, num_kv_heads = keys.length, keys.shape[1]
    mask = None if mask is None else mask[..., :kv_len]
    compute = torch.promote_types(query.dtype, torch.float32)

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(num_heads // num_kv_heads, dim=1)

    k_body, v_body = per_head(keys.body(compute)), per_head(values.body(compute))
    (k_dense, k_sink), (v_dense, v_sink) = keys.overrides(compute), values.overrides(compute)
    k_dense, v_dense = per_head(k_dense), per_head(v_dense)
    columns = torch.arange(kv_len, device=query.device)

    outputs, logsumexps = [], []
    for j in range(q_len):
        position = kv_len - q_len + j
        hidden, bias = (m.squeeze(2) for m in mask_rows(mask, j, j + 1, q_len, kv_len, compute, query.device))
        q = query[:, :, j, :, None].to(compute)
        from_ring = k_sink | (columns >= keys.dense_from(position))
        scores = torch.where(from_ring[:, None], (k_dense @ q)[..., 0], (k_body @ q)[..., 0]) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = (scores + bias).masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(compute)[None, :, None].expand(batch, -1, 1)], dim=-1)
        logsumexp = scores.logsumexp(-1)
        weights = (scores - logsumexp[..., None]).exp()[..., :kv_len]
        # Hidden columns are zeroed before the product: they may hold NaN, and 0 * NaN is NaN.
        from_ring = v_sink | (columns >= values.dense_from(position))
        v = torch.where(from_ring[:, None, :, None], v_dense, v_body).masked_fill(hidden[..., None], 0.0)
        weights = weights.masked_fill(hidden, 0.0)
        outputs.append((weights[..., None, :] @ v)[..., 0, :])
        logsumexps.append(logsumexp)
    return torch.stack(outputs, 2).to(query.dtype), torch.stack(logsumexps, 2).float()


def reads_rotary_keys(latents: QuantizedStates, rotary: QuantizedStates) -> bool:
    """No: their scores are a mask of `decode_attention`; see `ops.latent_attention`."""
    return False


def takes_prompts() -> bool:
    """No: there is no `prompt_attention` here."""
    return False


def paged_read(states: PagedStates, row: int, output: torch.Tensor) -> None:
    """Same as `PagedStates.read`."""
    states.read(row, output)


def mask_rows(
    mask: torch.Tensor | None, start: int, end: int, q_len: int, kv_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the queries `start .. end` of `q_len`: the hidden columns, bool, and the term to add to the scores, in
    `dtype`. Both broadcast to `[batch, num_heads, end - start, kv_len]`."""
    no_bias = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    if mask is None or mask.ndim == 2:
        position = torch.arange(start, end, device=device)[:, None] + kv_len - q_len
        hidden = (torch.arange(kv_len, device=device) > position)[None, None]
        return (hidden if mask is None else hidden | (mask == 0)[:, None, None]), no_bias
    rows = mask[:, :, start:end] if mask.shape[2] > 1 else mask
    if rows.dtype == torch.bool:
        return ~rows, no_bias
    return rows <= torch.finfo(rows.dtype).min, rows.to(dtype)


def rotary_mask(
    query: torch.Tensor, rotary: QuantizedStates, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The mask that adds the scores of rotary queries and keys to those of latents.

    Args:
        query: `[batch, num_heads, q_len, head_dim]` of the rotary keys.
        mask: as in `decode_attention`.

    Returns:
        A complete additive mask `[batch, num_heads, q_len, kv_len]`, in float32 at least.
    """
    q_len, kv_len, first = query.shape[2], rotary.length, rotary.position(query.shape[2])
    compute = torch.promote_types(query.dtype, torch.float32)
    rotated = query.to(compute) * scaling
    # Heads are rows of one product: a product for each head takes ten times as long.
    scores = [rotated[:, :, j] @ rotary.dequantize(first + j)[:, 0].to(compute).mT for j in range(q_len)]
    bias = torch.stack(scores, dim=2)
    if mask is None and q_len == 1 and rotary.device_length is None:
        return bias
    mask = None if mask is None else mask[..., :kv_len]
    if mask is None or mask.ndim == 2:
        columns, rows = torch.arange(kv_len, device=query.device), torch.arange(q_len, device=query.device)
        seen = (columns <= first + rows[:, None])[None, None]
        mask = seen if mask is None else seen & (mask != 0)[:, None, None]
    hidden, added = mask_rows(mask, 0, q_len, q_len, kv_len, compute, query.device)
    return (bias + added).masked_fill(hidden, torch.finfo(compute).min)


def quantize_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    faults: torch.Tensor,
    padding: torch.Tensor | None = None,
    *,
    start: int,
    appends: torch.Tensor | None = None,
    factors: Factors = NO_FACTORS,
) -> None:
    """Write new tokens into the storage of `keys` and `values`, in place.

    Args:
        key, value: `[batch, num_kv_heads, n, head_dim]` for the columns `start .. start + n`.
        keys, values: states whose storage has room for `start + n` columns; their `length` is not used.
        faults: int64 `[2]`. The first element is raised by the number of token vectors that hold a NaN or infinity,
            the second by the number of tokens without room. If there is no room for all tokens, none is stored.
        padding: bool `[batch, p]`, True for columns below p that are padding. They do not influence the scales of
            blocks, and are not sinks.
        start: the number of columns written before, unless the states have a `device_length`, which replaces it.
        appends: int64 `[2]` beside a `device_length`, or None. If it is given, the append counts itself: it raises the
            `device_length` by n, with room for the tokens or without, and the second element by one. The first one is
            for kernels, and 0 between calls.
        factors: the error feedback of keys and of values, as in `quantization.quantize`.

    A block of the channel grid is quantized when its last column arrives; its earlier columns come from the ring. The
    first tokens of a row that are not padding become its sinks; a slot that holds a column from `start` on is free.

    Raises:
        ValueError: key or value has another head_dim than its states, or factors do not fit their side.
    """
    for name, x, states, feedback in zip(("key", "value"), (key, value), (keys, values), factors):
        if x.shape[3] != states.head_dim:
            raise ValueError(f"{name}: head_dim {x.shape[3]} does not fit the storage; expected {states.head_dim}")
        if feedback is not None:
            check_factors(f"{name} factors", feedback, states.spec, x.shape[1], x.shape[3])
    if keys.device_length is not None:
        start = keys.asked_length()
    if appends is not None:
        keys.count_append(key.shape[2], appends)
    if any(start + x.shape[2] > states.data.shape[2] for x, states in ((key, keys), (value, values))):
        faults[1] += key.shape[2]
        return
    for x, states, feedback in zip((key, value), (keys, values), factors):
        n = x.shape[2]
        end = start + n
        faults[0] += (~x.isfinite()).any(-1).sum()
        if states.spec.is_dense:
            states.data[:, :, start:end] = x
        elif states.spec.is_channel:
            _append_blocks(x, states, padding, feedback, start)
        else:
            quantized = quantize(x, states.spec)
            states.data[:, :, start:end] = quantized.data
            states.scale[:, :, start:end] = quantized.scale
        if states.recent is not None:
            ring_length = states.recent.shape[2]
            last = torch.arange(max(start, end - ring_length), end, device=x.device)
            states.recent[:, :, last % ring_length] = x[:, :, last - start]
    if keys.sink_positions is not None and keys.sink_positions.numel():
        _append_sinks(key, value, keys, values, padding, start)


def paged_attention(
    query: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    s_aux: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode_attention` of one query per row, `[rows, num_heads, 1, head_dim]`, over rows of different lengths."""
    seen = keys.table.placed.seen
    results = [
        decode_attention(
            query[i : i + 1], keys.row(i), values.row(i),
            None if seen is None else seen[i : i + 1, : int(keys.table.lengths[i])], s_aux, scaling=scaling,
            softcap=softcap,
        )
        for i in range(query.shape[0])
    ]  # fmt: skip
    outputs, logsumexps = zip(*results)
    return torch.cat(outputs), torch.cat(logsumexps)


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    factors: Factors = NO_FACTORS,
) -> None:
    """`quantize_append` of n tokens per row, `[rows, num_kv_heads, n, head_dim]`, behind the lengths of the table."""
    for i in range(key.shape[0]):
        start, n = int(keys.table.lengths[i]), key.shape[2]
        for index in range(start // keys.page_length, -(-(start + n) // keys.page_length)):
            first = index * keys.page_length
            begin, end = max(start, first), min(start + n, first + keys.page_length)
            new_key, new_value = (x[i : i + 1, :, begin - start : end - start] for x in (key, value))
            page_keys, page_values = keys.page(i, index), values.page(i, index)
            sinks = page_keys.sink_positions
            sinks[0, : begin - first] = torch.arange(min(begin - first, sinks.shape[1]))
            quantize_append(new_key, new_value, page_keys, page_values, faults, start=begin - first, factors=factors)


def _append_sinks(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    padding: torch.Tensor | None,
    start: int,
) -> None:
    n, positions = key.shape[2], keys.sink_positions
    is_token = torch.ones(key.shape[0], n, dtype=torch.bool, device=key.device)
    if padding is not None:
        padding = padding[:, start : start + n]
        is_token[:, : padding.shape[1]] = ~padding
    taken = ((positions >= 0) & (positions < start)).sum(1, keepdim=True)
    slots = taken + is_token.long().cumsum(1) - 1
    row, column = torch.nonzero(is_token & (slots < positions.shape[1]), as_tuple=True)
    slot = slots[row, column]
    positions[row, slot] = (start + column).int()
    for x, states in ((key, keys), (value, values)):
        if states.sink is not None:
            states.sink[row, :, slot] = x[row, :, column]


def _append_blocks(
    x: torch.Tensor,
    states: QuantizedStates,
    padding: torch.Tensor | None,
    factors: torch.Tensor | None,
    start: int,
) -> None:
    """Quantize every block that the columns `start .. start + n` complete."""
    length = states.spec.block_length
    first, last = start // length, (start + x.shape[2]) // length
    if first == last:
        return
    early = torch.arange(first * length, start, device=x.device) % states.recent.shape[2]
    blocks = torch.cat([states.recent[:, :, early], x[:, :, : last * length - start]], dim=2)
    if padding is not None:
        padding = padding[:, first * length : last * length]
        padding = torch.nn.functional.pad(padding, (0, blocks.shape[2] - padding.shape[1]))
    quantized = quantize(blocks, states.spec, padding, factors)
    states.data[:, :, first * length : last * length] = quantized.data
    states.scale[:, :, first:last] = quantized.scale
    if quantized.zero_point is not None:
        states.zero_point[:, :, first:last] = quantized.zero_point


def retire(
    keys: Stored,
    values: Stored,
    sink_positions: torch.Tensor,
    length: torch.Tensor,
    dropped: torch.Tensor,
    block_length: int,
    n: int,
    kept: int,
) -> None:
    """Move the columns of a sliding layer to the front of its storage, in place, if `n` more tokens have no room.

    Whole blocks are retired that queries of the new tokens, or after a crop, do not read: all but the last `kept`
    columns, the new ones included.

    Args:
        sink_positions: int32 `[batch, sink_length]`, columns; a sink that is retired moves to the first column.
        length, dropped: int64 scalars on the device: the number of stored columns, and of tokens before them.
        block_length: that of the longer blocks of the two sides; 1 without blocks.
    """
    capacity = keys.data.shape[2]
    end = length + n
    gone = (torch.minimum(end - kept, length) // block_length * block_length).clamp(min=0) * (end > capacity)
    if length.device.type == "cpu" and not gone:
        return
    for tensor in (*keys, *values):
        if tensor is None or tensor is keys.sink or tensor is values.sink:
            continue
        column = torch.arange(tensor.shape[2], device=tensor.device)
        if tensor is keys.recent or tensor is values.recent:
            # A column's slot is its number modulo the ring's length.
            moved = (column + gone) % tensor.shape[2]
        else:
            # Scales have a row for each column, or for each block of the side's own length.
            moved = (column + gone * tensor.shape[2] // capacity).clamp(max=tensor.shape[2] - 1)
        tensor.copy_(tensor.index_select(2, moved))
    sink_positions.copy_(torch.where(sink_positions < 0, -1, (sink_positions - gone).clamp(min=0)))
    length -= gone
    dropped += gone
