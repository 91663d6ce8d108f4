"""`QuantizedStates`: the return value of `cache.update()` that makes attention read the cache as stored.

It is a frozen value of views, one for keys and one for values; making one copies nothing. It knows which columns a
query reads from exact (dense) copies instead of the quantized body:

    query i reads column t dense  iff  t is one of the row's first `sink_length` unpadded tokens,
                                  or   i - t < recent_length,
                                  or   (channel grid) t lies in the same block as i.

The rule belongs to the query, not to the update, so sixteen queries at once equal sixteen single steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch

from .quantization import QuantizedTensor, QuantSpec
from .route import Routes


def dense_from(position: int | torch.Tensor, spec: QuantSpec, recent_length: int) -> int | torch.Tensor:
    """The first column, sinks aside, that the query at `position` reads exactly."""
    if spec.is_dense:
        return position + 1
    back: int | torch.Tensor = recent_length - 1
    if spec.is_channel:
        in_block = position % spec.block_length
        back = in_block.clamp(min=back) if isinstance(in_block, torch.Tensor) else max(in_block, back)
    start = position - back
    return start.clamp(min=0) if isinstance(start, torch.Tensor) else max(start, 0)


def hides_columns(sliding_window: int | None, length: int | None) -> bool:
    """Whether a sliding window hides a column from any query in a sequence of this length (None: of unknown length).
    A wide window hides nothing."""
    return sliding_window is not None and (length is None or sliding_window < length)


def mask_length(length: int, sliding_window: int | None, q_len: int) -> int:
    """How many of the last columns the mask of the newest `q_len` queries has. In a sliding layer it begins with the
    first column that the first of these queries may see."""
    return length if sliding_window is None else min(length, sliding_window - 1 + q_len)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """The tensor in autocast's dtype, in which attention then computes; unchanged if autocast is off."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else x


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def is_captured() -> bool:
    """Whether operations are now being recorded in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Tensors(NamedTuple):
    data: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    recent: torch.Tensor | None = None
    sink: torch.Tensor | None = None


class Stored(_Tensors):
    """The tensors that store keys or values of one layer, in the order in which the operators take them.

    data: the body: codes uint8 `[batch, num_kv_heads, capacity, row_bytes]`, or (spec dense) elements in the model's
        dtype `[batch, num_kv_heads, capacity, head_dim]`. Columns without a token, and on the channel grid those of a
        block that is not yet complete, are not written.
    scale, zero_point: float16, as in `QuantizedTensor`, for the whole capacity.
    recent: a ring `[batch, num_kv_heads, ring_length, head_dim]` of the last tokens in the model's dtype, column t in
        slot `t % ring_length`; None if no query reads it.
    sink: `[batch, num_kv_heads, sink_length, head_dim]` exact copies of the columns in `sink_positions`.
    """

    # What a compiled backend has checked about the tensors, whose shapes and strides never change; see `arguments`.
    layout: Any = None
    # The sink positions that it has checked beside them, their batch, its stride in bytes, and the number of slots.
    sinks: tuple[torch.Tensor | None, int, int, int] = (None, 0, 0, 0)
    # Whether backend "cuda" has checked their alignment, which does not change either.
    is_aligned = False
    # Of keys: how backend "cpu" repeats its last calls of `ops.decode_attention` and `ops.quantize_append` for other
    # columns, queries and new tokens. They return None or False for another call, which has to be checked.
    attend_again: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
    append_again: Callable[..., bool] | None = None

    def transformed(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Stored:
        """The result of `function` for every tensor."""
        return Stored(*(None if tensor is None else function(tensor) for tensor in self))

    def __reduce__(self) -> tuple:
        # Without what calls have remembered, of which addresses are no use to another process.
        return Stored, tuple(self)

    def __deepcopy__(self, memo: dict) -> Stored:
        # torch.compile traces copies of caches (see `export`), and cannot trace the default copy of a tuple.
        return Stored(*(copy.deepcopy(tensor, memo) for tensor in self))


class Kept(NamedTuple):
    """Which tokens the columns of a layer are that has evicted some (see `evicting`). Masks have a column per token.

    Columns from `front` on are consecutive tokens, the first of which is token `start`. Columns before `front`, and
    those that left the window, are seen if they are sinks.

    window: the number of latest tokens that a query sees, its own included; None: all of the consecutive ones.
    is_sink: bool `[batch, columns]`; None: as the states' `sink_positions` say.
    """

    front: int
    start: int
    window: int | None = None
    is_sink: torch.Tensor | None = None


class HasStored:
    """Attributes for the tensors of `stored`."""

    stored: Stored
    device = property(lambda self: self.stored.data.device)
    data = property(lambda self: self.stored.data)
    scale = property(lambda self: self.stored.scale)
    zero_point = property(lambda self: self.stored.zero_point)
    recent = property(lambda self: self.stored.recent)
    sink = property(lambda self: self.stored.sink)


def _not_a_tensor(what: object) -> str:
    return (
        f"{what} was called on the quantized states of a KV cache. Run the model through generate(), or inside "
        "`with hf_kvquant.attention(model):`, so that attention can read them."
    )


@dataclass(frozen=True, eq=False)
class QuantizedStates(HasStored):
    """Keys or values of one layer, as stored.

    Args:
        spec: resolved `QuantSpec` of the body.
        stored: the tensors; columns of the body from `length` on are not written.
        sink_positions: int32 `[batch, sink_length]`, -1 for sinks that a row does not have yet.
        length: the number of columns (kv_len).
        recent_length: see the module's docstring.
        head_dim, dtype: those of the states before they were stored.
        device_length: int64 scalar on the device, or None. If it is given, it is the number of columns, and `length`
            is only its upper limit, which is all that a compiled step knows, since it cannot read from the device.
        sliding_window: the layer's window, or None. The masks of its queries have `mask_length` columns.
        mask_width: None, or that of masks with a column for every token (of a sliding layer in a static cache).
        dropped: the number of tokens before the first stored column; beside a `device_length` a tensor.
        kept: None, or which tokens the columns are if a mask has others too.
        backend: the operator's backend, "auto" or a name.
        routes: the cache's route counter, in which attention counts its calls.
    """

    spec: QuantSpec
    stored: Stored
    sink_positions: torch.Tensor | None
    length: int
    recent_length: int
    head_dim: int
    dtype: torch.dtype
    backend: str = "auto"
    routes: Routes = field(default_factory=Routes)
    device_length: torch.Tensor | None = None
    sliding_window: int | None = None
    mask_width: int | None = None
    dropped: int | torch.Tensor = 0
    kept: Kept | None = None

    @classmethod
    def of(cls, **fields: Any) -> QuantizedStates:
        """The states of these fields. The constructor of a frozen dataclass takes longer than a short kernel."""
        if torch.compiler.is_dynamo_compiling():
            return cls(**fields)
        states = object.__new__(cls)
        object.__setattr__(states, "__dict__", fields)
        return states

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.data.shape[0], self.data.shape[1], self.length, self.head_dim))

    @property
    def ndim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> QuantizedStates:
        """Move the storage to another device, as accelerate's hooks do; a change of dtype is refused."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            raise ValueError(f"dtype: quantized states of {self.dtype} cannot become {dtype}; dequantize them")
        if device is None or device == self.device:
            return self

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self, stored=self.stored.transformed(move), sink_positions=move(self.sink_positions),
            device_length=move(self.device_length),
            dropped=move(self.dropped) if isinstance(self.dropped, torch.Tensor) else self.dropped,
        )  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        raise TypeError(_not_a_tensor(getattr(func, "__name__", func)))

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError(_not_a_tensor("indexing"))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_not_a_tensor(name))

    @property
    def capacity(self) -> int:
        """The number of columns that the storage has room for."""
        return self.data.shape[2]

    def position(self, q_len: int) -> int | torch.Tensor:
        """The position of the first of the newest `q_len` queries."""
        return (self.length if self.device_length is None else self.device_length) - q_len

    def is_sink(self) -> torch.Tensor:
        """Which columns are sinks, bool `[batch, length]`."""
        is_sink = torch.zeros(self.shape[0], self.length + 1, dtype=torch.bool, device=self.device)
        # Slots without a sink have position -1, and go to one more column.
        return is_sink.scatter_(1, self.sink_positions.long() % (self.length + 1), True)[:, :-1]

    def asked_length(self) -> int:
        """The device's length as an integer; waits for the device.

        Raises:
            RuntimeError: a CUDA graph is being captured, in which nothing can be read from the device.
        """
        if is_captured():
            raise RuntimeError(
                "backend 'reference' asks the device for the length of a static cache, which a CUDA graph cannot; "
                "expected states of FP16 or BF16, which backend 'cuda' takes, or disable_compile=True"
            )
        return int(self.device_length)

    def count_append(self, n: int, appends: torch.Tensor) -> None:
        """Count an append of n tokens on the device, as `reference.quantize_append` says."""
        self.device_length.add_(n)
        appends[1] += 1

    def known(self) -> QuantizedStates:
        """The same states with the device's length as `length`."""
        if self.device_length is None:
            return self
        length = min(self.asked_length(), self.length)
        return QuantizedStates.of(**vars(self) | {"length": length, "device_length": None})

    def dense_from(self, position: int | torch.Tensor) -> int | torch.Tensor:
        """The first column that the query at `position` reads from the ring (columns before it: body or sink)."""
        # Without a ring, columns after the query, which a complete mask may show, are read from the body too.
        return self.length if self.recent is None else dense_from(position, self.spec, self.recent_length)

    def _range(self, columns: slice | None) -> tuple[int, int]:
        """Where a slice of columns begins, at a multiple of any block length, and ends."""
        start, end, _ = (columns or slice(None)).indices(self.length)
        assert start % 256 == 0, start
        return start, max(start, end)

    def body(self, dtype: torch.dtype = torch.float32, columns: slice | None = None) -> torch.Tensor:
        """The de-quantized body `[batch, num_kv_heads, columns, head_dim]`; columns not yet written are arbitrary."""
        start, end = self._range(columns)
        data = self.data[:, :, start:end]
        if self.spec.is_dense:
            return data.to(dtype)
        rows = slice(start, end)
        if self.spec.is_channel:
            rows = slice(start // self.spec.block_length, -(-end // self.spec.block_length))
        zero_point = None if self.zero_point is None else self.zero_point[:, :, rows]
        return QuantizedTensor(data, self.scale[:, :, rows], zero_point, self.spec, self.head_dim).dequantize(dtype)

    def overrides(
        self, dtype: torch.dtype = torch.float32, columns: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact copies by column, `[batch, num_kv_heads, columns, head_dim]`, and which columns are sinks,
        bool `[batch, columns]`. Columns that no query reads exactly are arbitrary."""
        column = torch.arange(*self._range(columns), device=self.device)
        batch, heads = self.shape[:2]
        shape = (batch, heads, len(column), self.head_dim)
        if self.recent is None:
            dense = torch.zeros(shape, dtype=dtype, device=self.device)
        else:
            dense = self.recent[:, :, column % self.recent.shape[2]].to(dtype)
        is_sink = torch.zeros(batch, len(column), dtype=torch.bool, device=self.device)
        if self.sink is not None:
            at = self.sink_positions[:, :, None] == column
            is_sink = at.any(1)
            slot = at.int().argmax(1)[:, None, :, None].expand(shape)
            dense = torch.where(is_sink[:, None, :, None], self.sink.to(dtype).gather(2, slot), dense)
        return dense, is_sink

    def dequantize(self, position: int | torch.Tensor | None = None, columns: slice | None = None) -> torch.Tensor:
        """The states `[batch, num_kv_heads, length, head_dim]` that the query at `position` (default: the last) reads.

        For several queries pass the position of the first: the others then read a few more columns exactly than they
        would one by one. Columns from `device_length` on are zero. A slice of `columns`, which begins at a multiple of
        256, leaves out the others.
        """
        position = self.position(1) if position is None else position
        column = torch.arange(*self._range(columns), device=self.device)
        if self.spec.is_dense:
            read = self.body(self.dtype, columns)
        else:
            exact = torch.promote_types(self.dtype, torch.float32)
            dense, is_sink = self.overrides(exact, columns)
            read_dense = is_sink | (column >= self.dense_from(position))
            read = torch.where(read_dense[:, None, :, None], dense, self.body(exact, columns)).to(self.dtype)
        if self.device_length is None:
            return read
        return torch.where((column < self.device_length)[:, None], read, 0)

    def read(self, q_len: int) -> torch.Tensor:
        """What the newest `q_len` queries read, `[batch, num_kv_heads, mask_length, head_dim]`; see `dequantize`.
        Beside a `device_length` it has all columns of the storage or, if masks have more, those of masks."""
        read = self.dequantize(self.position(q_len))
        if self.device_length is not None and self.mask_width is not None:
            column = torch.arange(self.mask_width, device=self.device) - self.dropped
            is_stored = (column >= 0) & (column < self.length)
            return torch.where(is_stored[:, None], read[:, :, column.clamp(0, self.length - 1)], 0)
        if self.device_length is not None:
            return read
        read = read[:, :, self.length - mask_length(self.length, self.sliding_window, q_len) :]
        # Dense storage is not copied so far, and a sliding layer of a static cache moves its columns in place.
        return read.clone() if self.spec.is_dense and self.mask_width is not None else read


def widened(mask: torch.Tensor | None, states: QuantizedStates, q_len: int) -> torch.Tensor | None:
    """The mask for all columns that a sliding layer has stored: the model's knows nothing of those before the window,
    and may leave the window to attention."""
    window, kv_len = states.sliding_window, states.shape[2]
    if not hides_columns(window, kv_len):
        return mask
    known = mask_length(kv_len, window, q_len)
    if mask is not None and mask.shape[-1] == known:
        hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() and mask.ndim == 4 else 0
        mask = torch.nn.functional.pad(mask, (kv_len - known, 0), value=hidden)
    return complete_mask(mask, states, q_len) if mask is None or mask.ndim == 2 else mask


def complete_mask(mask: torch.Tensor | None, states: QuantizedStates, q_len: int) -> torch.Tensor:
    """What a padding mask or none leaves to attention, as a bool mask `[batch or 1, 1, q_len, kv_len]`."""
    columns = torch.arange(states.shape[2], device=states.device)
    positions = columns[:q_len, None] + states.position(q_len)
    seen = columns <= positions
    if states.sliding_window is not None:
        seen &= columns > positions - states.sliding_window
    return seen[None, None] if mask is None else seen & (mask != 0)[:, None, None]


class PageTable(NamedTuple):
    """Where the columns of each row of a batch are stored.

    pages: int64 `[batch, pages]`, the page of each `page_length` columns; entries behind the last page are arbitrary
        pages that exist.
    exact: int64 `[batch]`, the row of `recent` and `sink` in the stored tensors, or None if there are none.
    lengths: int64 `[batch]`, the columns that each row has.
    dropped: int64 `[batch]`, the tokens of each row before its first column (whole pages), or None if there are none.
    seen: bool `[batch, columns]`, which columns the query at a row's last one sees, or None if it sees all.
    on_device: the same tensors on the GPU that has the pages; without it they are on the CPU only.
    """

    pages: torch.Tensor
    exact: torch.Tensor | None
    lengths: torch.Tensor
    dropped: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    on_device: PageTable | None = None

    @property
    def placed(self) -> PageTable:
        """The table whose tensors are on the device of the pages."""
        return self if self.on_device is None else self.on_device

    def dropped_of(self, row: int) -> int:
        return 0 if self.dropped is None else int(self.dropped[row])


@dataclass(frozen=True, eq=False)
class PagedStates(HasStored):
    """Keys or values of many rows of different lengths, stored in pages.

    Args:
        stored: as in `QuantizedStates`, with pages in place of the batch and `page_length` columns each.
        table: the pages of every row. Its column t is column `t % page_length` of page `t // page_length`; sink i is
            token i, and so column `i - dropped`, if there is such a column.
        spec, recent_length, head_dim, dtype, backend: as in `QuantizedStates`.
    """

    spec: QuantSpec
    stored: Stored
    table: PageTable
    page_length: int
    sink_length: int
    recent_length: int
    head_dim: int
    dtype: torch.dtype
    backend: str = "auto"

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[1]

    def row(self, row: int) -> QuantizedStates:
        """A contiguous copy of one row."""
        length = int(self.table.lengths[row])
        pages = self.table.pages[row, : -(-length // self.page_length)]

        def joined(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[pages].transpose(0, 1).flatten(1, 2)[None]

        def exact(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None or self.table.exact is None else x[self.table.exact[row]][None]

        stored = Stored(*map(joined, self.stored[:3]), *map(exact, self.stored[3:]))
        sinks = torch.arange(self.sink_length, dtype=torch.int32, device=self.data.device) - self.table.dropped_of(row)
        sinks = torch.where(sinks < length, sinks, -1).clamp(min=-1)[None]
        return QuantizedStates(
            self.spec, stored, sinks, length, self.recent_length, self.head_dim, self.dtype, self.backend
        )

    def past(self, row: int, more: int = 0, read: Callable[..., None] | None = None) -> torch.Tensor:
        """What the query behind a row's last column reads, `[1, num_kv_heads, length + more, head_dim]`:
        `row(row).read(0)`, and room for `more` columns behind it.

        Args:
            read: a faster function than `PagedStates.read`.
        """
        length = int(self.table.lengths[row])
        past = torch.empty(
            (1, self.num_kv_heads, length + more, self.head_dim), dtype=self.dtype, device=self.data.device
        )
        (PagedStates.read if read is None else read)(self, row, past[:, :, :length])
        if self.spec.is_dense or self.table.exact is None:
            return past
        area = int(self.table.exact[row])
        if self.recent is not None:
            first = int(dense_from(length, self.spec, self.recent_length))
            past[:, :, first:length] = self.recent[area][:, torch.arange(first, length) % self.recent.shape[2]]
        gone = self.table.dropped_of(row)
        if self.sink is not None and gone < self.sink_length:
            held = min(self.sink_length - gone, length)
            past[:, :, :held] = self.sink[area][:, gone : gone + held]
        return past

    def read(self, row: int, output: torch.Tensor) -> None:
        """De-quantize the stored columns of a row to `output` `[1, num_kv_heads, length, head_dim]`.

        This is done page by page: it takes many operations, and a page stays in the processor's cache.
        """
        exact = torch.promote_types(self.dtype, torch.float32)
        for index, first in enumerate(range(0, output.shape[2], self.page_length)):
            columns = output[:, :, first : first + self.page_length]
            columns.copy_(self.page(row, index).body(exact, slice(columns.shape[2])))

    def page(self, row: int, index: int) -> QuantizedStates:
        """Page `index` of a row as storage of its own, whose column 0 is the page's first."""
        at = int(self.table.pages[row, index])
        stored = [None if x is None else x[at : at + 1] for x in self.stored[:3]]
        if self.table.exact is not None:
            at = int(self.table.exact[row])
        stored += [None if x is None else x[at : at + 1] for x in self.stored[3:]]
        has_sinks = index == 0 and self.table.dropped_of(row) == 0
        if not has_sinks:
            stored[4] = None
        num_sinks = self.sink_length if has_sinks else 0
        sinks = torch.full((1, num_sinks), -1, dtype=torch.int32, device=self.data.device)
        return QuantizedStates(
            self.spec, Stored(*stored), sinks, self.page_length, self.recent_length, self.head_dim, self.dtype,
            self.backend,
        )  # fmt: skip
