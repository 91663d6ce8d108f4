"""The C structs of kernels/include/kvquant/params.h, and how an operator's arguments fill them.

Every compiled backend is called through these two functions, so that all read the same fields of the same tensors. A
struct holds addresses; the tensors that were made on the way, contiguous copies for instance, live as long as it does.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from struct import Struct

import torch

MAX_HEAD_DIM = 512

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"int8": 0, "fp8": 1, "int4": 2, "dense": 3}
_NO_MASK, _PADDING_MASK, _BOOL_MASK = 0, 1, 2
_ADDITIVE_MASKS = {torch.float32: 3, torch.float16: 4, torch.bfloat16: 5}
_PADDING_WIDTHS = {torch.bool: 1, torch.uint8: 1, torch.int8: 1, torch.int32: 4, torch.int64: 8}


def _struct(name: str, pointers: str, numbers: str, doubles: str = "", **nested: type) -> type[ctypes.Structure]:
    """A struct of 8-byte fields in the order pointers, numbers, doubles, nested structs."""
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in numbers.split()]
    fields += [(field, ctypes.c_double) for field in doubles.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields + list(nested.items())})


Side = _struct(
    "Side",
    "data scale zero_point recent sink",
    "data_batch data_head scale_batch scale_head recent_batch recent_head sink_batch sink_head "
    "capacity ring_length format grid group_length rotate head_dim",
)
Attention = _struct(
    "Attention",
    "query output logsumexp mask s_aux sink_positions length",
    "query_batch query_head query_row mask_batch mask_head mask_row mask_column sink_positions_batch num_sinks "
    "mask_kind mask_width dtype batch num_heads num_kv_heads q_len kv_len recent_length isa threads",
    "scaling softcap",
    keys=Side,
    values=Side,
)
NewTokens = _struct("NewTokens", "x", "batch_stride head_stride row_stride n", side=Side)
Append = _struct(
    "Append",
    "faults padding sink_positions length",
    "padding_stride padding_length sink_positions_batch num_sinks dtype batch num_kv_heads start isa threads",
    keys=NewTokens,
    values=NewTokens,
)


def _packing(struct: type[ctypes.Structure]) -> str:
    """The struct's fields as a format of `struct.Struct`, the fields of nested ones in their places."""
    codes = {ctypes.c_void_p: "q", ctypes.c_int64: "q", ctypes.c_double: "d"}
    return "".join(codes.get(type_) or _packing(type_) for _, type_ in struct._fields_)


# Filled in one go: setting a nested structure field by field takes as long as a short kernel.
_ATTENTION, _APPEND = (Struct("=" + _packing(struct)) for struct in (Attention, Append))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _head_strides(tensor: torch.Tensor | None, name: str, itemsize: int) -> tuple[int, int]:
    """Strides of batch and head in bytes; the rows below them must be contiguous."""
    if tensor is None:
        return 0, 0
    batch, head, row, column = tensor.stride()
    if column != 1 or row != tensor.size(3):
        where = f"strides {tensor.stride()} of a stored {tensor.dtype} tensor"
        raise ValueError(f"{name}: {where} are not allowed; expected contiguous rows")
    return batch * itemsize, head * itemsize


@lru_cache(maxsize=None)
def _side_numbers(name: str, spec, head_dim: int) -> tuple[int, ...]:
    """The last fields of a side, which depend on nothing else."""
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} head_dim: {head_dim} is not allowed; expected a multiple of 16 up to {MAX_HEAD_DIM}")
    channel = spec.grid == "channel"
    group_length = (spec.block_length if channel else spec.group_size) or head_dim
    return FORMATS[spec.format], channel, group_length, spec.rotate, head_dim


def _side(name: str, states, itemsize: int) -> tuple[int, ...]:
    """The fields of a `Side`."""
    data, scale, zero_point, recent, sink = (
        states.data, states.scale, states.zero_point, states.recent, states.sink,
    )  # fmt: skip
    return (
        data.data_ptr(), _address(scale), _address(zero_point), _address(recent), _address(sink),
        *_head_strides(data, name, data.element_size()), *_head_strides(scale, name, 2),
        *_head_strides(recent, name, itemsize), *_head_strides(sink, name, itemsize),
        data.size(2), 0 if recent is None else recent.size(2), *_side_numbers(name, states.spec, states.head_dim),
    )  # fmt: skip


def _sink_positions(keys, values) -> tuple[int, int, int]:
    """Address, stride of batch in bytes, and number of slots."""
    positions = keys.sink_positions
    if positions is None or (keys.sink is None and values.sink is None):
        return 0, 0, 0
    if positions.dtype != torch.int32 or positions.stride(1) != 1:
        raise ValueError(f"sink_positions: dtype {positions.dtype} does not fit; expected contiguous int32 rows")
    return positions.data_ptr(), positions.stride(0) * 4, positions.shape[1]


def _check_dtypes(dtype: torch.dtype, *tensors: torch.Tensor | None, names: str) -> int:
    for i, tensor in enumerate(tensors):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{names.split()[i]}: dtype {tensor.dtype} does not fit; expected {dtype}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not supported; expected one of {[str(d) for d in DTYPES]}")
    return DTYPES[dtype]


def _dense(states) -> torch.Tensor | None:
    """The body, where it has the model's dtype."""
    return states.data if states.spec.format == "dense" else None


def attention(
    query, keys, values, mask, s_aux, scaling: float, softcap: float, isa: int = 0, threads: int = 0
) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """The argument of `decode_attention`, and the output and log-sum-exp that the kernel will write.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, by name.
    """
    dtype = query.dtype
    code = _check_dtypes(
        dtype, query, keys.recent, keys.sink, values.recent, values.sink, _dense(keys), _dense(values),
        names="query keys keys values values keys values",
    )  # fmt: skip
    if values.spec.grid == "channel":
        raise ValueError("values grid: 'channel' is not supported in attention; expected 'token'")
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, num_heads, q_len, _ = query.shape
    batch_stride, head_stride, row_stride, _ = query.stride()
    itemsize = query.element_size()
    output = query.new_empty((batch, num_heads, q_len, values.head_dim))
    logsumexp = query.new_empty((batch, num_heads, q_len), dtype=torch.float32)

    kind, width, mask_strides = _NO_MASK, 0, (0, 0, 0, 0)
    if mask is not None:
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
        mask_strides = strides if len(strides) == 4 else (strides[0], 0, 0, strides[1])
    if s_aux is not None:
        s_aux = s_aux.to(torch.float32).contiguous()
    positions, positions_stride, num_sinks = _sink_positions(keys, values)
    packed = _ATTENTION.pack(
        query.data_ptr(), output.data_ptr(), logsumexp.data_ptr(), _address(mask), _address(s_aux), positions,
        _address(keys.device_length), batch_stride * itemsize, head_stride * itemsize, row_stride * itemsize,
        *mask_strides, positions_stride, num_sinks, kind, width, code, batch, num_heads, keys.data.shape[1], q_len,
        keys.length, keys.recent_length, isa, threads, scaling, softcap, *_side("keys", keys, itemsize),
        *_side("values", values, itemsize),
    )  # fmt: skip
    arguments = Attention.from_buffer_copy(packed)
    arguments.alive = query, mask, s_aux
    return arguments, output, logsumexp


def append(key, value, keys, values, faults, padding, start: int, isa: int = 0, threads: int = 0) -> Append:
    """The argument of `quantize_append`.

    Raises:
        ValueError: a dtype, head_dim or layout that the kernels do not take, by name.
    """
    code = _check_dtypes(
        key.dtype, key, value, keys.recent, values.recent, _dense(keys), _dense(values),
        names="key value keys values keys values",
    )  # fmt: skip
    if padding is not None and padding.stride(1) != 1:
        padding = padding.contiguous()
    batch, num_kv_heads = key.shape[:2]
    sides, alive = [], [padding]
    for name, x, states in (("key", key, keys), ("value", value, values)):
        itemsize, end = x.element_size(), start + x.shape[2]
        knows_end = states.device_length is None
        if x.shape[3] != states.head_dim or (knows_end and end > states.data.shape[2]):
            room = (batch, num_kv_heads, states.data.shape[2] - start, states.head_dim)
            raise ValueError(f"{name}: shape {tuple(x.shape)} does not fit; storage has room for {room}")
        if states.spec.grid == "channel" and states.recent is None and start % states.spec.block_length:
            raise ValueError(f"{name}s recent: None is not allowed when a block is continued at column {start}")
        if x.stride(3) != 1:
            x = x.contiguous()
        alive.append(x)
        strides = [s * itemsize for s in x.stride()[:3]]
        sides += [x.data_ptr(), *strides, x.shape[2], *_side(f"{name}s", states, itemsize)]
    positions, positions_stride, num_sinks = _sink_positions(keys, values)
    packed = _APPEND.pack(
        faults.data_ptr(), _address(padding), positions, _address(keys.device_length),
        0 if padding is None else padding.stride(0), 0 if padding is None else padding.shape[1],
        positions_stride, num_sinks, code, batch, num_kv_heads, start, isa, threads, *sides,
    )  # fmt: skip
    arguments = Append.from_buffer_copy(packed)
    arguments.alive = alive
    return arguments
