"""The C structs of kernels/include/kvquant/params.h, and two functions that fill them with an operator's arguments.

Every compiled backend is called through `attention` and `append`, so all read the same fields of the same tensors. A
struct holds addresses; tensors that were made on the way, contiguous copies for instance, live as long as it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Any, ClassVar, NamedTuple

import torch

from ..quantization import NO_FACTORS, Factors, QuantSpec, check_factors
from ..states import PagedStates, QuantizedStates

MAX_HEAD_DIM = 512

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"int8": 0, "fp8": 1, "int4": 2, "dense": 3, "int3": 4, "int2": 5}
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


class Rotary(ctypes.Structure):
    _fields_ = _fields("query", "query_batch query_head query_row", side=Side)


class Attention(ctypes.Structure):
    _fields_ = _fields(
        "query output logsumexp mask s_aux sink_positions length",
        "query_batch query_head query_row mask_batch mask_head mask_row mask_column sink_positions_batch num_sinks "
        "mask_kind mask_width dtype batch num_heads num_kv_heads q_len kv_len recent_length isa threads",
        "scaling softcap",
        keys=Side,
        values=Side,
        pages=Pages,
        rotary=Rotary,
    )
    dtype: int
    num_kv_heads: int
    kv_len: int
    alive: Sequence[Any]


class NewTokens(ctypes.Structure):
    _fields_ = _fields("x factors", "batch_stride head_stride row_stride n", side=Side)
    side: ClassVar[Any]
    factors: int | None


class Append(ctypes.Structure):
    _fields_ = _fields(
        "faults padding sink_positions length",
        "padding_stride padding_length sink_positions_batch num_sinks dtype batch num_kv_heads start isa threads",
        keys=NewTokens,
        values=NewTokens,
        pages=Pages,
    )
    dtype: int
    batch: int
    num_kv_heads: int
    alive: Sequence[Any]


class Prompt(ctypes.Structure):
    _fields_ = _fields(
        "query key value output",
        "query_head query_row key_head key_row value_head value_row num_heads num_kv_heads n kv_len head_dim window "
        "isa threads",
        "scaling",
    )


class Read(ctypes.Structure):
    _fields_ = _fields("output", "output_head dtype num_kv_heads length isa threads", side=Side, pages=Pages)
    alive: Sequence[Any]


# A side's addresses change from call to call, and its other fields, from `data_batch` on, do not.
_ADDRESSES = Side.data_batch.offset // 8
_SIDE_CONSTANTS = Struct(f"={len(Side._fields_) - _ADDRESSES}q")


def _packing(struct: Any) -> str:
    """The struct's fields as a format of `struct.Struct`: those of a side in its place, and as bytes pages and rotary
    keys, which few calls have (no bytes are packed as zeros)."""
    if struct is Side:
        return f"{_ADDRESSES}q{_SIDE_CONSTANTS.size}s"
    codes = {ctypes.c_void_p: "q", ctypes.c_int64: "q", ctypes.c_double: "d"}
    codes |= {rare: f"{ctypes.sizeof(rare)}s" for rare in (Pages, Rotary)}
    return "".join(codes.get(type_) or _packing(type_) for _, type_ in struct._fields_)


# Filled in one call: setting the fields of a nested structure one by one takes as long as a short kernel.
_ATTENTION, _APPEND, _READ, _PAGES, _ROTARY = (
    Struct("=" + _packing(struct)) for struct in (Attention, Append, Read, Pages, Rotary)
)


def _device(tensor: torch.Tensor) -> int:
    """The index of the tensor's device: -1 is the CPU, for which `get_device` takes "meta", too."""
    return -2 if tensor.is_meta else tensor.get_device()


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
    """The message for a side that does not fit: what it has and should have."""
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
    return f"{name}: the stored tensors do not fit: {'; '.join(told)}, all on the device of query or new tokens"


def _check_small(name: str, tensor: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Check that a small tensor has this dtype and shape, and is on the device of `like`."""
    if tensor is None or (tensor.dtype is dtype and tensor.shape == shape and _device(tensor) == _device(like)):
        return
    found = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    raise ValueError(f"{name}: {found} does not fit; expected {shape} of {dtype} on {like.device}")


@dataclass(frozen=True, eq=False)
class Form:
    """How a side is stored. `_form` makes equal ones one object, so that looking up what they decide is fast."""

    spec: QuantSpec
    head_dim: int
    has_recent: bool
    has_sink: bool


_form = lru_cache(maxsize=None)(Form)


class _Layout(NamedTuple):
    """What has been checked about the tensors of a `Stored`: they fit each other.

    what: the spec, head_dim and dtype that they are for.
    where: the device, batch and num_kv_heads that they are for.
    columns: the number that all of the body has; data has `capacity`.
    num_sinks: None: there is no tensor for them.
    constants: the fields of a `Side` from `data_batch` on, packed.
    """

    what: tuple[QuantSpec, int, torch.dtype]
    where: tuple[int, int, int]
    columns: int
    capacity: int
    num_sinks: int | None
    constants: bytes
    form: Form


def _layout(name: str, states: QuantizedStates | PagedStates, dtype: torch.dtype) -> _Layout | None:
    """The layout of a side beside queries or new tokens of `dtype`; None: its tensors do not fit each other."""
    spec, head_dim = states.spec, states.head_dim
    data, scale, zero_point, recent, sink = states.stored
    for tensor in (recent, sink, data if spec.is_dense else None):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype} does not fit; expected {dtype}")
    row, num_scales, block, has_zero_point = _row_sizes(spec, head_dim)
    batch, num_kv_heads, capacity, _ = data.shape
    columns, device, ring_length, num_sinks = capacity, _device(data), 0, None
    fits = data.shape[3] == row
    if num_scales:
        fits = fits and data.dtype is torch.uint8 and scale is not None and (zero_point is not None) is has_zero_point
        if fits:
            _, _, rows, _ = shape = scale.shape
            columns = min(columns, rows * block)
            fits = shape == (batch, num_kv_heads, rows, num_scales)
            fits = fits and scale.dtype is torch.float16 and _device(scale) == device
            if has_zero_point:
                # The struct has one stride for both.
                fits = fits and zero_point.shape == shape and zero_point.stride() == scale.stride()
                fits = fits and zero_point.dtype is torch.float16 and _device(zero_point) == device
    if recent is not None:
        _, _, ring_length, _ = shape = recent.shape
        fits = fits and shape == (batch, num_kv_heads, ring_length, head_dim)
        fits = fits and ring_length > 0 and _device(recent) == device
    if sink is not None:
        num_sinks = sink.shape[2]
        fits = fits and sink.shape == (batch, num_kv_heads, num_sinks, head_dim) and _device(sink) == device
    if not fits:
        return None
    constants = (
        *_head_strides(data, name, data.element_size(), row), *_head_strides(scale, name, 2, num_scales),
        *_head_strides(recent, name, dtype.itemsize, head_dim), *_head_strides(sink, name, dtype.itemsize, head_dim),
        capacity, ring_length, *_side_constants(name, spec, head_dim),
    )  # fmt: skip
    packed = _SIDE_CONSTANTS.pack(*constants)
    form = _form(spec, head_dim, recent is not None, sink is not None)
    what, where = (spec, head_dim, dtype), (device, batch, num_kv_heads)
    return _Layout(what, where, columns, capacity, num_sinks, packed, form)


def _side(
    name: str,
    states: QuantizedStates | PagedStates,
    dtype: torch.dtype,
    device: int,
    batch: int,
    num_kv_heads: int,
    columns: int | None,
    num_sinks: int,
) -> tuple[int | bytes, ...]:
    """The fields of a `Side`. A kernel sees only addresses, so this checks that the tensors have the memory it uses.

    The tensors themselves are checked once: a step finds their layout at the `Stored` that the step before it used.

    Args:
        columns: the number of columns to read or write, or None for all columns of `data`.
    """
    stored = states.stored
    layout = stored.layout
    if layout is None or layout.what != (states.spec, states.head_dim, dtype):
        layout = stored.layout = _layout(name, states, dtype)
    if (
        layout is None
        or layout.where != (device, batch, num_kv_heads)
        or layout.columns < (layout.capacity if columns is None else columns)
        or (num_sinks and layout.num_sinks not in (None, num_sinks))
    ):
        columns = stored.data.shape[2] if columns is None else columns
        raise ValueError(_misfit(name, states, (batch, num_kv_heads), columns, num_sinks))
    data, scale, zero_point, recent, sink = stored
    return (
        data.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if zero_point is None else zero_point.data_ptr(),
        0 if recent is None else recent.data_ptr(), 0 if sink is None else sink.data_ptr(), layout.constants,
    )  # fmt: skip


def _factors(name: str, factors: torch.Tensor, spec: QuantSpec, x: torch.Tensor) -> int:
    """The address of the error feedback of new tokens `x`."""
    check_factors(f"{name} factors", factors, spec, x.size(1), x.size(3))
    if not factors.is_contiguous() or _device(factors) != _device(x):
        raise ValueError(
            f"{name} factors: strides {factors.stride()} on {factors.device} are not allowed; expected a contiguous "
            f"tensor on {x.device}"
        )
    return factors.data_ptr()


def _sink_positions(keys: QuantizedStates, batch: int) -> tuple[int, int, int]:
    """The address of the sink positions, their stride of batch in bytes, and the number of slots."""
    positions, stored = keys.sink_positions, keys.stored
    if positions is None:
        return 0, 0, 0
    known, rows, stride, num_sinks = stored.sinks
    if known is not positions or rows != batch:
        num_sinks = positions.shape[-1]
        if not num_sinks:
            return 0, 0, 0
        _check_small("sink_positions", positions, stored.data, torch.int32, batch, num_sinks)
        if positions.stride(1) != 1:
            raise ValueError(f"sink_positions: strides {positions.stride()} are not allowed; expected contiguous rows")
        stride = positions.stride(0) * 4
        stored.sinks = positions, batch, stride, num_sinks
    return positions.data_ptr(), stride, num_sinks


def _dtype_code(dtype: torch.dtype) -> int:
    code = DTYPES.get(dtype)
    if code is None:
        raise ValueError(f"dtype: {dtype} is not supported; expected one of {[str(d) for d in DTYPES]}")
    return code


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
    rotary: tuple[torch.Tensor, QuantizedStates] | None = None,
) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """The argument of `decode_attention`, perhaps with rotary queries and keys beside latents, and the output and
    log-sum-exp that the kernel will write.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    dtype, device = query.dtype, _device(query)
    code = _dtype_code(dtype)
    batch_stride, head_stride, row_stride, element_stride = query.stride()
    if element_stride != 1:
        query = query.contiguous()
        batch_stride, head_stride, row_stride, _ = query.stride()
    batch, num_heads, q_len, head_dim = query.shape
    has_sinks = keys.stored.sink is not None or values.stored.sink is not None
    if has_sinks and keys.sink_positions is None:
        raise ValueError(
            "sink_positions: None is not allowed beside stored sinks; expected int32 [batch, sink_length]"
        )
    positions, positions_stride, num_sinks = _sink_positions(keys, batch) if has_sinks else (0, 0, 0)
    kv_len, num_kv_heads, length = keys.length, keys.stored.data.size(1), keys.device_length
    fits = num_kv_heads > 0 and num_heads % num_kv_heads == 0 and head_dim == keys.head_dim
    if not fits or not 1 <= q_len <= kv_len or values.length != kv_len:
        raise ValueError(_misfit_of_query(query, keys, values))
    if length is not None:
        _check_small("length", length, query, torch.int64)
    itemsize = dtype.itemsize
    # torch reads sizes faster than a tuple of them.
    output = query.new_empty(batch, num_heads, q_len, values.head_dim)
    logsumexp = query.new_empty(batch, num_heads, q_len, dtype=torch.float32)

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
    second = b""
    if rotary is not None:
        rotary_query, rotary_keys = rotary
        expected = (*query.shape[:3], rotary_keys.head_dim)
        _check_small("rotary_query", rotary_query, query, dtype, *expected)
        if rotary_keys.length != kv_len:
            raise ValueError(f"rotary: {rotary_keys.length} keys do not fit; expected {kv_len}")
        if rotary_query.stride(3) != 1:
            rotary_query = rotary_query.contiguous()
        second = _ROTARY.pack(
            rotary_query.data_ptr(), *(stride * itemsize for stride in rotary_query.stride()[:3]),
            *_side("rotary keys", rotary_keys, dtype, device, batch, num_kv_heads, kv_len, num_sinks),
        )  # fmt: skip
        rotary = rotary_query, rotary_keys
    packed = _ATTENTION.pack(
        query.data_ptr(), output.data_ptr(), logsumexp.data_ptr(), 0 if mask is None else mask.data_ptr(),
        0 if s_aux is None else s_aux.data_ptr(), positions, 0 if length is None else length.data_ptr(),
        batch_stride * itemsize, head_stride * itemsize, row_stride * itemsize,
        *mask_strides, positions_stride, num_sinks, kind, width, code, batch, num_heads, num_kv_heads, q_len,
        kv_len, keys.recent_length, isa, threads, scaling, softcap,
        *_side("keys", keys, dtype, device, batch, num_kv_heads, kv_len, num_sinks),
        *_side("values", values, dtype, device, batch, num_kv_heads, kv_len, num_sinks), b"", second,
    )  # fmt: skip
    arguments = Attention.from_buffer_copy(packed)
    arguments.alive = query, mask, s_aux, None if rotary is None else rotary[0]
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
    appends: torch.Tensor | None = None,
    factors: Factors = NO_FACTORS,
) -> Append:
    """The argument of `quantize_append`, without `appends`, which is only checked.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, or a size that does not fit; it is named.
    """
    dtype, device = key.dtype, _device(key)
    code, itemsize = _dtype_code(dtype), dtype.itemsize
    batch, num_kv_heads, _, _ = key.shape
    positions, positions_stride, num_sinks = _sink_positions(keys, batch)
    length = keys.device_length
    if value.shape[:2] != (batch, num_kv_heads) or (length is None and start < 0):
        raise ValueError(
            f"value: shape {tuple(value.shape)} at column {start} does not fit; expected batch and heads "
            f"{(batch, num_kv_heads)} as of key, at column 0 or later"
        )
    _check_small("faults", faults, key, torch.int64, 2)
    if faults.stride(0) != 1:
        raise ValueError(f"faults: strides {faults.stride()} are not allowed; expected contiguous elements")
    if length is not None:
        _check_small("length", length, key, torch.int64)
    if appends is not None:
        _check_small("appends", appends, key, torch.int64, 2)
        if length is None or appends.stride(0) != 1:
            raise ValueError(
                f"appends: strides {appends.stride()} beside length {length} are not allowed; expected "
                "contiguous elements and a length on the device"
            )
    padding_fields = 0, 0, 0
    if padding is not None:
        _check_small("padding", padding, key, torch.bool, batch, padding.size(-1))
        if padding.stride(1) != 1:
            padding = padding.contiguous()
        padding_fields = padding.data_ptr(), padding.stride(0), padding.size(1)
    sides: list[int | bytes] = []
    alive = [padding, *factors]
    for name, x, states, feedback in zip(("key", "value"), (key, value), (keys, values), factors):
        _, _, n, head_dim = x.shape
        end, data = start + n, states.stored.data
        if x.dtype is not dtype:
            raise ValueError(f"{name}: dtype {x.dtype} does not fit; expected {dtype}")
        if head_dim != states.head_dim or (length is None and end > data.size(2)):
            room = (batch, num_kv_heads, data.shape[2] - start, states.head_dim)
            raise ValueError(f"{name}: shape {tuple(x.shape)} does not fit; storage has room for {room}")
        if not _device(x) == device == _device(data):
            raise ValueError(f"{name}: device {x.device} does not fit; the storage is on {data.device}")
        if states.stored.recent is None and states.spec.is_channel and start % states.spec.block_length:
            raise ValueError(f"{name}s recent: None is not allowed when a block is continued at column {start}")
        if x.stride(3) != 1:
            x = x.contiguous()
        alive.append(x)
        columns = end if length is None else None
        batch_stride, head_stride, row_stride, _ = x.stride()
        address = 0 if feedback is None else _factors(name, feedback, states.spec, x)
        sides += x.data_ptr(), address, batch_stride * itemsize, head_stride * itemsize, row_stride * itemsize, n
        sides += _side(f"{name}s", states, dtype, device, batch, num_kv_heads, columns, num_sinks)
    padding_address, padding_stride, padding_length = padding_fields
    packed = _APPEND.pack(
        faults.data_ptr(), padding_address, positions, 0 if length is None else length.data_ptr(), padding_stride,
        padding_length, positions_stride, num_sinks, code, batch, num_kv_heads, start, isa, threads, *sides, b"",
    )  # fmt: skip
    arguments = Append.from_buffer_copy(packed)
    arguments.alive = alive
    return arguments


def _pages(keys: PagedStates, values: PagedStates, batch: int, new: int) -> tuple[int, bytes]:
    """The columns of the longest of `batch` rows, each with `new` columns behind its length, and their `Pages`.

    Raises:
        ValueError: they do not fit; `page_table` has checked the numbers of the pages.
    """
    pages, exact, lengths, _, _, _ = table = keys.table
    room = pages.shape[-1] * keys.page_length
    has_copies = any(x is not None for states in (keys, values) for x in states.stored[3:])
    fits = values.table is table and values.page_length == keys.page_length == keys.data.shape[2]
    fits = fits and pages.ndim == 2 and len(pages) == len(lengths) == batch > 0 and has_copies is (exact is not None)
    fits = fits and (exact is None or len(exact) == batch)
    longest = int(lengths.max()) + new if fits else 0
    if longest > room or not fits or int(lengths.min()) + new < 1:
        raise ValueError(
            f"table: pages {tuple(pages.shape)} of {keys.page_length} columns for lengths {lengths.tolist()} and "
            f"{new} new columns do not fit; expected {batch} rows with room for them, 1 column or more, and "
            f"exact areas: {has_copies}"
        )
    # The kernels read the tensors on the device of the pages.
    pages, exact, lengths, dropped, seen, _ = table.placed
    device = keys.data.device
    if seen is not None and (seen.dtype != torch.bool or seen.shape != (batch, room) or seen.device != device):
        raise ValueError(
            f"table seen: {seen.dtype} {tuple(seen.shape)} on {seen.device} is not allowed; expected bool "
            f"{(batch, room)} on {device}"
        )
    for name, x in (("pages", pages), ("exact", exact), ("lengths", lengths), ("dropped", dropped)):
        if x is not None and (x.dtype != torch.int64 or not x.is_contiguous() or x.device != device):
            raise ValueError(
                f"table {name}: {x.dtype} on {x.device} is not allowed; expected contiguous int64 on {device}"
            )
    addresses = pages.data_ptr(), _address(exact), lengths.data_ptr()
    return longest, _PAGES.pack(*addresses, pages.shape[1], keys.page_length)


def _paged_sides(keys: PagedStates, values: PagedStates, x: torch.Tensor) -> Iterator[tuple[int | bytes, ...]]:
    """The fields of both sides, beside queries or new tokens x."""
    num_pages, num_kv_heads = keys.data.shape[:2]
    for name, states in (("keys", keys), ("values", values)):
        yield _side(name, states, x.dtype, _device(x), num_pages, num_kv_heads, keys.page_length, states.sink_length)


@lru_cache(maxsize=None)
def _first_columns(n: int, device: torch.device) -> torch.Tensor:
    """The columns of the sinks, where none were dropped. On a GPU making them takes as long as a short kernel."""
    return torch.arange(n, dtype=torch.int32, device=device)


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
    code = _dtype_code(query.dtype)
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads = keys.num_kv_heads
    if q_len != 1 or num_heads % num_kv_heads or head_dim != keys.head_dim or query.device != keys.data.device:
        raise ValueError(
            f"query: {tuple(query.shape)} on {query.device} does not fit; expected a multiple of {num_kv_heads} "
            f"heads, one query and head_dim {keys.head_dim} on {keys.data.device}"
        )
    longest, pages = _pages(keys, values, batch, 0)
    table, num_sinks = keys.table.placed, keys.sink_length
    dropped, seen = table.dropped, table.seen
    positions = _first_columns(num_sinks, query.device) if num_sinks else None
    if positions is not None and dropped is not None:
        positions = (positions - dropped[:, None]).to(torch.int32)
    positions_stride = 0 if positions is None or dropped is None else num_sinks * positions.element_size()
    kind = _NO_MASK if seen is None else _PADDING_MASK
    mask_strides = (0, 0, 0, 0) if seen is None else (seen.stride(0), 0, 0, seen.stride(1))
    if s_aux is not None:
        _check_small("s_aux", s_aux, query, s_aux.dtype, num_heads)
        s_aux = s_aux.to(torch.float32).contiguous()
    itemsize = query.element_size()
    batch_stride, head_stride, row_stride, _ = (stride * itemsize for stride in query.stride())
    output = query.new_empty((batch, num_heads, 1, values.head_dim))
    logsumexp = query.new_empty((batch, num_heads, 1), dtype=torch.float32)
    packed = _ATTENTION.pack(
        query.data_ptr(), output.data_ptr(), logsumexp.data_ptr(), _address(seen), _address(s_aux),
        _address(positions), 0, batch_stride, head_stride, row_stride, *mask_strides, positions_stride, num_sinks,
        kind, 0 if seen is None else 1, code, batch, num_heads, num_kv_heads, 1, longest, keys.recent_length, isa,
        threads, scaling, softcap, *chain(*_paged_sides(keys, values, query)), pages, b"",
    )  # fmt: skip
    arguments = Attention.from_buffer_copy(packed)
    arguments.alive = query, s_aux, positions, *table[:5]
    return arguments, output, logsumexp


def paged_read(states: PagedStates, row: int, output: torch.Tensor, isa: int, threads: int) -> Read:
    """The arguments for de-quantizing the columns of one row to `output` `[1, num_kv_heads, length, head_dim]`.

    Raises:
        ValueError: the output does not fit.
    """
    length, code = int(states.table.lengths[row]), _dtype_code(states.dtype)
    expected = (1, states.num_kv_heads, length, states.head_dim)
    rows = (states.head_dim, 1)
    if tuple(output.shape) != expected or output.dtype != states.dtype or output.stride()[2:] != rows:
        raise ValueError(
            f"output: {tuple(output.shape)} of {output.dtype} with strides {output.stride()} is not allowed; expected "
            f"{expected} of {states.dtype}, with contiguous rows"
        )
    table = states.table._replace(
        pages=states.table.pages[row : row + 1], lengths=states.table.lengths[row : row + 1], seen=None
    )
    num_pages, num_kv_heads = states.data.shape[:2]
    side = _side(
        "states", states, states.dtype, _device(states.data), num_pages, num_kv_heads, states.page_length,
        states.sink_length,
    )  # fmt: skip
    pages = _PAGES.pack(table.pages.data_ptr(), 0, table.lengths.data_ptr(), table.pages.shape[1], states.page_length)
    packed = _READ.pack(
        output.data_ptr(), output.stride(1) * output.itemsize, code, states.num_kv_heads, length, isa, threads, *side,
        pages,
    )  # fmt: skip
    call = Read.from_buffer_copy(packed)
    call.alive = (table, output, states)
    return call


def paged_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: PagedStates,
    values: PagedStates,
    faults: torch.Tensor,
    isa: int = 0,
    threads: int = 0,
    factors: Factors = NO_FACTORS,
) -> Append:
    """As `append`, of n tokens per row into pages."""
    code = _dtype_code(key.dtype)
    if value.dtype != key.dtype:
        raise ValueError(f"value: dtype {value.dtype} does not fit; expected {key.dtype}")
    batch, num_kv_heads, n, _ = key.shape
    _check_small("faults", faults, key, torch.int64, 2)
    _, pages = _pages(keys, values, batch, n)
    alive: list[Any] = [*keys.table.placed[:5], *factors]
    sides: list[int | bytes] = []
    fields = _paged_sides(keys, values, key)
    for name, x, states, feedback in zip(("key", "value"), (key, value), (keys, values), factors):
        expected = (batch, states.num_kv_heads, n, states.head_dim)
        if tuple(x.shape) != expected or x.device != states.data.device:
            raise ValueError(
                f"{name}: {tuple(x.shape)} on {x.device} does not fit; expected {expected} on {states.data.device}"
            )
        if states.spec.is_channel and states.recent is None:
            raise ValueError(f"{name}s recent: None is not allowed on the channel grid of pages; expected a ring")
        if x.stride(3) != 1:
            x = x.contiguous()
        alive.append(x)
        address = 0 if feedback is None else _factors(name, feedback, states.spec, x)
        sides += [x.data_ptr(), address, *(s * x.element_size() for s in x.stride()[:3]), n, *next(fields)]
    packed = _APPEND.pack(
        faults.data_ptr(), 0, 0, 0, 0, 0, 0, keys.sink_length, code, batch, num_kv_heads, 0, isa, threads, *sides,
        pages,
    )  # fmt: skip
    arguments = Append.from_buffer_copy(packed)
    arguments.alive = alive
    return arguments
