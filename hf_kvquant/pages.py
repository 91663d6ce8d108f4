"""Pages: the cache of many requests in one flat tensor, and the two operators over it.

A page holds `page_length` columns of one layer and one request. It is a whole number of tiles (64 columns) and of
blocks of the channel grid, so that a full page has everything of its columns. Its bytes, each piece at a multiple of
64 bytes, with heads one after the other inside of a piece:

    | key codes | key scales | key zero points | value codes | value scales | value zero points |

Exact copies (see `states`) belong to a request, not to a page: on the channel grid the block that is not complete yet,
the last `recent_length` tokens, and the first `sink_length`. A request has one more area for them, for each layer:

    | ring of keys | ring of values | sinks of keys | sinks of values |

A ring has no room for a rollback, because continuous batching never takes tokens back. A token grid without exact
tokens needs no area at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import ops
from .config import KVQuantConfig
from .feedback import factors_in
from .quantization import QuantSpec
from .states import PagedStates, PageTable, Stored

ALIGNMENT = 64
TILE = 64
"""Columns that the kernels read at once."""


class _Piece(NamedTuple):
    """Bytes of a page or of an exact area: `shape` elements of `dtype`, `offset` bytes after its beginning."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: torch.Tensor, first: int, stride: int) -> torch.Tensor:
        """This piece of every unit of `stride` bytes in `memory`, `[units, *shape]`; unit 0 begins at `first`."""
        inner = [1]
        for size in reversed(self.shape[1:]):
            inner.insert(0, inner[0] * size)
        size = self.dtype.itemsize
        units = memory.numel() // stride
        return memory.view(self.dtype).as_strided(
            (units, *self.shape), (stride // size, *inner), (first + self.offset) // size
        )


def _pieces(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[dict[str, _Piece], int]:
    """The pieces one after the other, and the bytes of all."""
    pieces, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        pieces[name] = _Piece(end, shape, dtype)
        end = -(-pieces[name].end // ALIGNMENT) * ALIGNMENT
    return pieces, end


@dataclass(frozen=True)
class LayerPages:
    """The layout of one layer's pages and exact areas."""

    layer_idx: int
    specs: tuple[QuantSpec, QuantSpec]
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page: dict[str, _Piece]
    page_bytes: int
    exact: dict[str, _Piece]
    exact_bytes: int

    @classmethod
    def of(
        cls,
        config: KVQuantConfig,
        layer_idx: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        page_length: int,
    ) -> LayerPages:
        """The layout for pages of `page_length` tokens.

        Raises:
            ValueError: the page is not whole tiles and blocks, or head_dim cannot be quantized.
        """
        page: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        rings: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        sinks: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        specs = []
        for side, given in zip(("keys", "values"), config.for_layer(layer_idx)):
            try:
                spec = given.resolve(head_dim)
            except ValueError as error:
                raise ValueError(f"layer {layer_idx}: {side}.{error}") from None
            specs.append(spec)
            unit = max(TILE, spec.block_length or 1)
            if page_length % unit:
                raise ValueError(
                    f"page_size: {page_length} is not allowed with quantized {side} of layer {layer_idx}; expected a "
                    f"multiple of {unit}"
                )
            if spec.is_dense:
                page[f"{side}.data"] = (num_kv_heads, page_length, head_dim), dtype
                continue
            page[f"{side}.data"] = (num_kv_heads, page_length, spec.row_bytes(head_dim)), torch.uint8
            rows = page_length // (spec.block_length or 1)
            scales = (num_kv_heads, rows, spec.num_scales(head_dim)), torch.float16
            page[f"{side}.scale"] = scales
            if spec.has_zero_point:
                page[f"{side}.zero_point"] = scales
            window = max(config.recent_length, spec.block_length or 0)
            if window:
                rings[f"{side}.recent"] = (num_kv_heads, _ring_length(window, page_length), head_dim), dtype
            if config.sink_length:
                sinks[f"{side}.sink"] = (num_kv_heads, config.sink_length, head_dim), dtype
        fields = (layer_idx, (specs[0], specs[1]), num_kv_heads, head_dim, dtype)
        return cls(*fields, *_pieces(page), *_pieces(rings | sinks))


def _ring_length(window: int, page_length: int) -> int:
    """The shortest ring of at least `window` columns in which a column has the same slot in its page and in the whole
    sequence."""
    if window > page_length:
        raise ValueError(f"page_size: {page_length} is not allowed; expected at least {window}, as many as are exact")
    return next(length for length in range(window, page_length + 1) if page_length % length == 0)


class PagedLayer:
    """The pages of one layer, as views of the flat tensor."""

    def __init__(
        self, layout: LayerPages, config: KVQuantConfig, memory: torch.Tensor, first_page: int, first_exact: int,
        block_bytes: int, page_length: int,
    ):  # fmt: skip
        """
        Args:
            memory: uint8, blocks of `block_bytes` bytes.
            first_page, first_exact: where in a block the layer's page, or its exact area, begins.

        Raises:
            ValueError: the file of the config's error feedback cannot be read, or is not that of this model.
        """
        stored = []
        for side in ("keys", "values"):
            fields: dict[str, torch.Tensor] = {}
            for pieces, first in ((layout.page, first_page), (layout.exact, first_exact)):
                fields |= {
                    name.partition(".")[2]: piece.view(memory, first, block_bytes)
                    for name, piece in pieces.items()
                    if name.startswith(f"{side}.")
                }
            stored.append(Stored(**fields))
        self.stored: tuple[Stored, Stored] = (stored[0], stored[1])
        self.layout, self.config, self.page_length = layout, config, page_length
        shape = layout.num_kv_heads, layout.head_dim
        self.factors = factors_in(config.error_feedback, layout.layer_idx, layout.specs, (shape, shape), memory.device)

    def states(self, table: PageTable) -> tuple[PagedStates, PagedStates]:
        """Keys and values of the requests in a table."""
        keys, values = (
            PagedStates(
                spec, stored, table, self.page_length, self.config.sink_length, self.config.recent_length,
                self.layout.head_dim, self.layout.dtype, self.config.backend,
            )
            for spec, stored in zip(self.layout.specs, self.stored)
        )  # fmt: skip
        return keys, values

    def append(self, key: torch.Tensor, value: torch.Tensor, table: PageTable, faults: torch.Tensor) -> None:
        """Store new tokens `[rows, num_kv_heads, n, head_dim]` behind the `lengths` of the table."""
        ops.paged_append(key, value, *self.states(table), faults, self.factors)

    def past(self, table: PageTable, row: int, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """De-quantized keys and values of one row, `[1, num_kv_heads, length + more, head_dim]`, as the query after
        its last token reads them, with room for `more` tokens behind them."""
        keys, values = (ops.paged_past(states, row, more) for states in self.states(table))
        return keys, values


def page_table(
    blocks: Sequence[Sequence[int]],
    exact: Sequence[int] | None,
    lengths: Sequence[int],
    num_blocks: int,
    dropped: Sequence[int] | None = None,
) -> PageTable:
    """The table of some requests.

    Args:
        blocks: the pages of each request, in the order of its tokens.
        exact: the block of each request's exact area, or None.
        lengths: the columns of each request.
        num_blocks: the blocks that exist; the kernels trust the numbers.
        dropped: the tokens of each request before its first column, or None.

    Raises:
        ValueError: a block does not exist.
    """
    width = max(map(len, blocks))
    table = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in blocks], dtype=torch.int64)
    rows = None if exact is None else torch.tensor(exact, dtype=torch.int64)
    for name, numbers in (("blocks", table), ("exact", rows)):
        if numbers is not None and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_blocks:
            raise ValueError(f"{name}: {numbers.tolist()} is not allowed; expected 0 to {num_blocks - 1}")
    before = None if dropped is None else torch.tensor(dropped, dtype=torch.int64)
    return PageTable(table, rows, torch.tensor(lengths, dtype=torch.int64), before)
