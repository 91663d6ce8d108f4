"""The C structs of kernels/include/kvquant/params.h, and two functions that fill them with an operator's arguments.

Every compiled backend is called through `attention` and `append`, so all read the same fields of the same tensors. A
struct holds addresses; tensors that were made on the way, contiguous copies for instance, live as long as it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Any, ClassVar

import torch

from ..quantization import QuantSpec
from ..states import PagedStates, QuantizedStates

MAX_HEAD_DIM = 512

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"int8": 0, "fp8": 1, "int4": 2, "dense": 3}
_NO_MASK, _PADDING_MASK, _BOOL_MASK = 0, 1, 2
_ADDITIVE_MASKS = {torch.float32: 3, torch.float16: 4, torch.bfloat16: 5}
_PADDING_WIDTHS = {torch.bool: 1, torch.uint8: 1, torch.int8: 1, torch.int32: 4, torch.int64: 8}


def _fields(pointers: str, integers: str, doubles: str = "", **nested: type[ctypes.Structure]) -> list:
    """Fields of 8 bytes in the order pointers, integers, doubles, and after them nested structs."""
    fields: list[tuple[str, type]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_double) for field in doubles.split()]
    return fields + list(nested.items())


class Side(ctypes.Structure):
    _fields_ = _fields(
        "data scale zero_point recent sink",
        "data_batch data_head scale_batch scale_head recent_batch recent_head sink_batch sink_head "
        "capacity ring_length format grid group_length rotate head_dim",
    )


class Pages(ctypes.Structure):
    _fields_ = _fields("table exact lengths", "table_stride page_length")
    alive: Sequence[torch.Tensor | None]


class Attention(ctypes.Structure):
    _fields_ = _fields(
        "query output logsumexp mask s_aux sink_positions length pages",
        "query_batch query_head query_row mask_batch mask_head mask_row mask_column sink_positions_batch num_sinks "
        "mask_kind mask_width dtype batch num_heads num_kv_heads q_len kv_len recent_length isa threads",
        "scaling softcap",
        keys=Side,
        values=Side,
    )
    dtype: int
    num_kv_heads: int
    kv_len: int
    alive: Sequence[Any]


class NewTokens(ctypes.Structure):
    _fields_ = _fields("x", "batch_stride head_stride row_stride n", side=Side)
    side: ClassVar[Any]


class Append(ctypes.Structure):
    _fields_ = _fields(
        "faults padding sink_positions length pages",
        "padding_stride padding_length sink_positions_batch num_sinks dtype batch num_kv_heads start isa threads",
        keys=NewTokens,
        values=NewTokens,
    )
    dtype: int
    batch: int
    num_kv_heads: int
    alive: Sequence[Any]


def _packing(struct: Any) -> str:
    """The struct's fields as a format of `struct.Struct`, with the fields of nested structs in their places."""
    codes = {ctypes.c_void_p: "q", ctypes.c_int64: "q", ctypes.c_double: "d"}
    return "".join(codes.get(type_) or _packing(type_) for _, type_ in struct._fields_)


# Filled in one call: setting the fields of a nested structure one by one takes as long as a short kernel.
_ATTENTION, _APPEND = (Struct("=" + _packing(struct)) for struct in (Attention, Append))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _head_strides(tensor: torch.Tensor | None, name: str, itemsize: int, row_length: int) -> tuple[int, int]:
    """The strides of batch and head in bytes; the rows of each head must be contiguous."""
    if tensor is None:
        return 0, 0
    batch, head, row, column = tensor.stride()
    if column != 1 or row != row_length:
        where = f"strides {tensor.stride()} of a stored {tensor.dtype} tensor"
        raise ValueError(f"{name}: {where} are not allowed; expected contiguous rows")
    return batch * itemsize, head * itemsize


@lru_cache(maxsize=None)
def _side_constants(name: str, spec: QuantSpec, head_dim: int) -> tuple[int, ...]:
    """The last fields of a side, which depend on nothing but its spec and head_dim."""
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} head_dim: {head_dim} is not allowed; expected a multiple of 16 up to {MAX_HEAD_DIM}")
    channel = spec.grid == "channel"
    group_length = (spec.block_length if channel else spec.group_size) or head_dim
    return FORMATS[spec.format], channel, group_length, spec.rotate, head_dim


@lru_cache(maxsize=None)
def _row_sizes(spec: QuantSpec, head_dim: int) -> tuple[int, int, int, bool]:
    """The number of elements in a row of `data`, of scales in a row of `scale` (0: none), of tokens per scale, and
    whether there are zero points."""
    if spec.is_dense:
        return head_dim, 0, 1, False
    return spec.row_bytes(head_dim), spec.num_scales(head_dim), spec.block_length or 1, spec.has_zero_point


def _misfit(
    name: str, states: QuantizedStates | PagedStates, heads: tuple[int, int], columns: int, num_sinks: int
) -> str:
    """The message for a side that does not fit: what it has and should have. `_side` makes these checks faster."""
    row, num_scales, block, has_zero_point = _row_sizes(states.spec, states.head_dim)
    rows, ring = -(-columns // block), f"1 or more, {states.head_dim}"
    scales = f"{heads}, {rows} or more, {num_scales} of torch.float16" if num_scales else "None"
    expected = {
        "data": f"{heads}, {columns} or more, {row} of {torch.uint8 if num_scales else states.dtype}",
        "scale": scales,
        "zero_point": f"{scales}, laid out like scale" if has_zero_point else "None",
        "recent": f"{heads}, {ring} or None",
        "sink": f"{heads}, {num_sinks}, {states.head_dim} or None",
    }
    told = []
    for field, t in states.stored._asdict().items():
        has = "None" if t is None else f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        told.append(f"{field} {has} (expected {expected[field]})")
    return f"{name}: the stored tensors do not fit: {'; '.join(told)}, all on one device"


def _check_small(name: str, tensor: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Check that a small tensor has this dtype and shape, and is on the device of `like`."""
    if tensor is None or (
        tensor.dtype is dtype and tensor.shape == shape and tensor.get_device() == like.get_device()
    ):
        return
    found = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    raise ValueError(f"{name}: {found} does not fit; expected {shape} of {dtype} on {like.device}")


def _side(
    name: str,
    states: QuantizedStates | PagedStates,
    itemsize: int,
    batch: int,
    num_kv_heads: int,
    columns: int | None,
    num_sinks: int,
) -> tuple[int, ...]:
    """The fields of a `Side`. A kernel sees only addresses, so this checks that the tensors have the memory it uses.

    Args:
        columns: the number of columns to read or write, or None for all columns of `data`.
    """
    data, scale, zero_point, recent, sink = states.stored
    head_dim, device = states.head_dim, data.get_device()
    row, num_scales, block, has_zero_point = _row_sizes(states.spec, head_dim)
    _, _, capacity, _ = shape = data.shape
    columns = capacity if columns is None else columns
    fits = shape == (batch, num_kv_heads, capacity, row) and capacity >= columns
    if num_scales:
        fits = fits and data.dtype is torch.uint8 and scale is not None and (zero_point is not None) is has_zero_point
        if fits:
            _, _, rows, _ = shape = scale.shape
            fits = shape == (batch, num_kv_heads, rows, num_scales) and rows * block >= columns
            fits = fits and scale.dtype is torch.float16 and scale.get_device() == device
            if has_zero_point:
                # The struct has one stride for both.
                fits = fits and zero_point.shape == shape and zero_point.stride() == scale.stride()
                fits = fits and zero_point.dtype is torch.float16 and zero_point.get_device() == device
    ring_length = 0
    if recent is not None:
        _, _, ring_length, _ = shape = recent.shape
        fits = fits and shape == (batch, num_kv_heads, ring_length, head_dim)
        fits = fits and ring_length > 0 and recent.get_device() == device
    if sink is not None and num_sinks:
        fits = fits and sink.shape == (batch, num_kv_heads, num_sinks, head_dim) and sink.get_device() == device
    if not fits:
        raise ValueError(_misfit(name, states, (batch, num_kv_heads), columns, num_sinks))
    return (
        data.data_ptr(), _address(scale), _address(zero_point), _address(recent), _address(sink),
        *_head_strides(data, name, data.element_size(), row), *_head_strides(scale, name, 2, num_scales),
        *_head_strides(recent, name, itemsize, head_dim), *_head_strides(sink, name, itemsize, head_dim),
        capacity, ring_length, *_side_constants(name, states.spec, head_dim),
    )  # fmt: skip


def _sink_positions(keys: QuantizedStates, values: QuantizedStates, batch: int) -> tuple[int, int, int]:
    """The address of the sink positions, their stride of batch in bytes, and the number of slots."""
    positions = keys.sink_positions
    if positions is None or (keys.stored.sink is None and values.stored.sink is None):
        return 0, 0, 0
    num_sinks = positions.shape[-1]
    _check_small("sink_positions", positions, keys.data, torch.int32, batch, num_sinks)
    if positions.stride(1) != 1:
        raise ValueError(f"sink_positions: strides {positions.stride()} are not allowed; expected contiguous rows")
    return positions.data_ptr(), positions.stride(0) * 4, num_sinks


def _check_dtypes(dtype: torch.dtype, *tensors: torch.Tensor | None, names: str) -> int:
    for i, tensor in enumerate(tensors):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{names.split()[i]}: dtype {tensor.dtype} does not fit; expected {dtype}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not supported; expected one of {[str(d) for d in DTYPES]}")
    return DTYPES[dtype]


def _dense(states: QuantizedStates | PagedStates) -> torch.Tensor | None:
    """The body if it has the model's dtype, else None."""
    return states.data if states.spec.format == "dense" else None


def attention(
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    scaling: float,
    softcap: float,
    isa: int = 0,
    threads: int = 0,
) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """The argument of `decode_attention`, and the output and log-sum-exp that the kernel will write.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    dtype, k, v = query.dtype, keys.stored, values.stored
    code = _check_dtypes(
        dtype, query, k.recent, k.sink, v.recent, v.sink, _dense(keys), _dense(values),
        names="query keys keys values values keys values",
    )  # fmt: skip
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, num_heads, q_len, head_dim = query.shape
    positions, positions_stride, num_sinks = _sink_positions(keys, values, batch)
    kv_len, num_kv_heads = keys.length, k.data.size(1)
    fits = num_kv_heads > 0 and num_heads % num_kv_heads == 0 and head_dim == keys.head_dim
    if not fits or not 1 <= q_len <= kv_len or values.length != kv_len or query.get_device() != k.data.get_device():
        raise ValueError(_misfit_of_query(query, keys, values))
    _check_small("length", keys.device_length, query, torch.int64)
    batch_stride, head_stride, row_stride, _ = query.stride()
    itemsize = query.element_size()
    output = query.new_empty((batch, num_heads, q_len, values.head_dim))
    logsumexp = query.new_empty((batch, num_heads, q_len), dtype=torch.float32)

    kind, width = _NO_MASK, 0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        whole = (batch, kv_len) if mask.ndim == 2 else (batch, num_heads, q_len, kv_len)
        if mask.ndim != len(whole) or any(m not in (1, w) for m, w in zip(mask.shape, whole)):
            raise ValueError(f"mask: shape {tuple(mask.shape)} does not fit; expected {whole}, or 1 instead of a size")
        _check_small("mask", mask, query, mask.dtype, *mask.shape)
        if mask.ndim == 2:
            if mask.dtype not in _PADDING_WIDTHS:
                mask = mask != 0
            kind, width = _PADDING_MASK, mask.element_size()
        elif mask.dtype == torch.bool:
            kind = _BOOL_MASK
        elif mask.dtype in _ADDITIVE_MASKS:
            kind = _ADDITIVE_MASKS[mask.dtype]
        else:
            raise ValueError(f"mask: dtype {mask.dtype} is not supported; expected bool, float32, float16 or bfloat16")
        size = mask.element_size()
        strides = [s * size if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape)]
        mask_strides = (strides[0], 0, 0, strides[1]) if len(strides) == 2 else tuple(strides)
    if s_aux is not None:
        _check_small("s_aux", s_aux, query, s_aux.dtype, num_heads)
        s_aux = s_aux.to(torch.float32).contiguous()
    sides = (
        _side(name, states, itemsize, batch, num_kv_heads, kv_len, num_sinks)
        for name, states in (("keys", keys), ("values", values))
    )
    packed = _ATTENTION.pack(
        query.data_ptr(), output.data_ptr(), logsumexp.data_ptr(), _address(mask), _address(s_aux), positions,
        _address(keys.device_length), 0, batch_stride * itemsize, head_stride * itemsize, row_stride * itemsize,
        *mask_strides, positions_stride, num_sinks, kind, width, code, batch, num_heads, num_kv_heads, q_len,
        kv_len, keys.recent_length, isa, threads, scaling, softcap, *chain(*sides),
    )  # fmt: skip
    arguments = Attention.from_buffer_copy(packed)
    arguments.alive = query, mask, s_aux
    return arguments, output, logsumexp


def _misfit_of_query(query: torch.Tensor, keys: QuantizedStates, values: QuantizedStates) -> str:
    states = f"{keys.length} keys and {values.length} values on {keys.data.device}"
    expected = f"a multiple of {keys.data.shape[1]} heads, 1 to {keys.length} queries and head_dim {keys.head_dim}"
    return f"query: {tuple(query.shape)} on {query.device} does not fit states of {states}; expected {expected}"


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    faults: torch.Tensor,
    padding: torch.Tensor | None,
    start: int,
    isa: int = 0,
    threads: int = 0,
) -> Append:
    """The argument of `quantize_append`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    k, v = keys.stored, values.stored
    code = _check_dtypes(
        key.dtype, key, value, k.recent, v.recent, k.sink, v.sink, _dense(keys), _dense(values),
        names="key value keys values keys values keys values",
    )  # fmt: skip
    batch, num_kv_heads = key.shape[:2]
    positions, positions_stride, num_sinks = _sink_positions(keys, values, batch)
    knows_end = keys.device_length is None
    if value.shape[:2] != (batch, num_kv_heads) or (knows_end and start < 0):
        raise ValueError(
            f"value: shape {tuple(value.shape)} at column {start} does not fit; expected batch and heads "
            f"{(batch, num_kv_heads)} as of key, at column 0 or later"
        )
    _check_small("faults", faults, key, torch.int64, 2)
    _check_small("length", keys.device_length, key, torch.int64)
    if padding is not None:
        _check_small("padding", padding, key, torch.bool, batch, padding.size(-1))
    if padding is not None and padding.stride(1) != 1:
        padding = padding.contiguous()
    if faults.stride(0) != 1:
        raise ValueError(f"faults: strides {faults.stride()} are not allowed; expected contiguous elements")
    sides: list[int] = []
    alive = [padding]
    for name, x, states in (("key", key, keys), ("value", value, values)):
        itemsize, end, data = x.element_size(), start + x.shape[2], states.stored.data
        if x.shape[3] != states.head_dim or (knows_end and end > data.shape[2]):
            room = (batch, num_kv_heads, data.shape[2] - start, states.head_dim)
            raise ValueError(f"{name}: shape {tuple(x.shape)} does not fit; storage has room for {room}")
        if not x.get_device() == key.get_device() == data.get_device():
            raise ValueError(f"{name}: device {x.device} does not fit; the storage is on {data.device}")
        if states.spec.grid == "channel" and states.recent is None and start % states.spec.block_length:
            raise ValueError(f"{name}s recent: None is not allowed when a block is continued at column {start}")
        if x.stride(3) != 1:
            x = x.contiguous()
        alive.append(x)
        strides = [s * itemsize for s in x.stride()[:3]]
        side = _side(f"{name}s", states, itemsize, batch, num_kv_heads, end if knows_end else None, num_sinks)
        sides += [x.data_ptr(), *strides, x.shape[2], *side]
    packed = _APPEND.pack(
        faults.data_ptr(), _address(padding), positions, _address(keys.device_length), 0,
        0 if padding is None else padding.stride(0), 0 if padding is None else padding.shape[1],
        positions_stride, num_sinks, code, batch, num_kv_heads, start, isa, threads, *sides,
    )  # fmt: skip
    arguments = Append.from_buffer_copy(packed)
    arguments.alive = alive
    return arguments


def _pages(keys: PagedStates, values: PagedStates, batch: int, new: int) -> Pages:
    """The tables of `batch` rows, each with `new` columns behind its length.

    Raises:
        ValueError: they do not fit; `page_table` has checked the numbers of the pages.
    """
    pages, exact, lengths = table = keys.table
    room = pages.shape[-1] * keys.page_length
    has_copies = any(x is not None for states in (keys, values) for x in states.stored[3:])
    fits = values.table is table and values.page_length == keys.page_length == keys.data.shape[2]
    fits = fits and pages.ndim == 2 and len(pages) == len(lengths) == batch > 0 and has_copies is (exact is not None)
    fits = fits and (exact is None or len(exact) == batch)
    if not fits or int(lengths.max()) + new > room or int(lengths.min()) + new < 1:
        raise ValueError(
            f"table: pages {tuple(pages.shape)} of {keys.page_length} columns for lengths {lengths.tolist()} and "
            f"{new} new columns do not fit; expected {batch} rows with room for them, 1 column or more, and "
            f"exact areas: {has_copies}"
        )
    for name, x in (("pages", pages), ("exact", exact), ("lengths", lengths)):
        if x is not None and (x.dtype != torch.int64 or not x.is_contiguous() or x.device.type != "cpu"):
            raise ValueError(
                f"table {name}: {x.dtype} on {x.device} is not allowed; expected contiguous int64 on the CPU"
            )
    struct = Pages(pages.data_ptr(), _address(exact), lengths.data_ptr(), pages.shape[1], keys.page_length)
    struct.alive = pages, exact, lengths
    return struct


def _paged_sides(keys: PagedStates, values: PagedStates, itemsize: int) -> Iterator[tuple[int, ...]]:
    num_pages, num_kv_heads = keys.data.shape[:2]
    for name, states in (("keys", keys), ("values", values)):
        yield _side(name, states, itemsize, num_pages, num_kv_heads, keys.page_length, states.sink_length)


def paged_attention(
    query: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    s_aux: torch.Tensor | None,
    scaling: float,
    softcap: float,
    isa: int = 0,
    threads: int = 0,
) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """As `attention`, of one query per row over pages."""
    k, v = keys.stored, values.stored
    code = _check_dtypes(
        query.dtype, query, k.recent, k.sink, v.recent, v.sink, _dense(keys), _dense(values),
        names="query keys keys values values keys values",
    )  # fmt: skip
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads = keys.num_kv_heads
    if q_len != 1 or num_heads % num_kv_heads or head_dim != keys.head_dim or query.device != keys.data.device:
        raise ValueError(
            f"query: {tuple(query.shape)} on {query.device} does not fit; expected a multiple of {num_kv_heads} "
            f"heads, one query and head_dim {keys.head_dim} on {keys.data.device}"
        )
    pages = _pages(keys, values, batch, 0)
    num_sinks = keys.sink_length
    positions = torch.arange(num_sinks, dtype=torch.int32) if num_sinks else None
    if s_aux is not None:
        _check_small("s_aux", s_aux, query, s_aux.dtype, num_heads)
        s_aux = s_aux.to(torch.float32).contiguous()
    itemsize = query.element_size()
    batch_stride, head_stride, row_stride, _ = (stride * itemsize for stride in query.stride())
    output = query.new_empty((batch, num_heads, 1, values.head_dim))
    logsumexp = query.new_empty((batch, num_heads, 1), dtype=torch.float32)
    packed = _ATTENTION.pack(
        query.data_ptr(), output.data_ptr(), logsumexp.data_ptr(), 0, _address(s_aux), _address(positions), 0,
        ctypes.addressof(pages), batch_stride, head_stride, row_stride, 0, 0, 0, 0, 0, num_sinks, _NO_MASK, 0, code,
        batch, num_heads, num_kv_heads, 1, 0, keys.recent_length, isa, threads, scaling, softcap,
        *chain(*_paged_sides(keys, values, itemsize)),
    )  # fmt: skip
    arguments = Attention.from_buffer_copy(packed)
    arguments.alive = query, s_aux, positions, pages
    return arguments, output, logsumexp


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    isa: int = 0,
    threads: int = 0,
) -> Append:
    """As `append`, of n tokens per row into pages."""
    k, v = keys.stored, values.stored
    code = _check_dtypes(
        key.dtype, key, value, k.recent, v.recent, k.sink, v.sink, _dense(keys), _dense(values),
        names="key value keys values keys values keys values",
    )  # fmt: skip
    batch, num_kv_heads, n, _ = key.shape
    _check_small("faults", faults, key, torch.int64, 2)
    pages = _pages(keys, values, batch, n)
    alive: list[Any] = [pages]
    sides: list[int] = []
    fields = _paged_sides(keys, values, key.element_size())
    for name, x, states in (("key", key, keys), ("value", value, values)):
        expected = (batch, states.num_kv_heads, n, states.head_dim)
        if tuple(x.shape) != expected or x.device != states.data.device:
            raise ValueError(f"{name}: {tuple(x.shape)} on {x.device} does not fit; expected {expected} on the CPU")
        if states.spec.is_channel and states.recent is None:
            raise ValueError(f"{name}s recent: None is not allowed on the channel grid of pages; expected a ring")
        if x.stride(3) != 1:
            x = x.contiguous()
        alive.append(x)
        sides += [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:3]), n, *next(fields)]
    packed = _APPEND.pack(
        faults.data_ptr(), 0, 0, 0, ctypes.addressof(pages), 0, 0, 0, keys.sink_length, code, batch, num_kv_heads, 0,
        isa, threads, *sides,
    )  # fmt: skip
    arguments = Append.from_buffer_copy(packed)
    arguments.alive = alive
    return arguments
