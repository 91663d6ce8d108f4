"""Formats, and the definition of the stored bytes, in plain PyTorch.

A `QuantSpec` says how one side of the cache (keys or values) is stored; `quantize(x, spec)` gives a `QuantizedTensor`,
and its `dequantize()` the lossy copy. This file is the *definition*: every compiled backend writes the same bytes, bit
for bit. So all steps are float32 with one IEEE rounding each, and they multiply where a library might divide.

Two grids. On the **token grid** a token's vector of one head is quantized on its own, in groups along head_dim with
one FP16 scale each: bytes never depend on other tokens. On the **channel grid** `block_length` consecutive
tokens of one head share, per channel, an FP16 scale and zero point: keys of trained models differ far more between
channels than between neighbouring tokens (KIVI, https://arxiv.org/abs/2402.02750; KVQuant,
https://arxiv.org/abs/2401.18079).

With **error feedback** the channels of a complete block are quantized from the last to the first, and what the error
of one costs is taken from those before it (see `feedback`). The stored bytes are read as ever. From c = head_dim - 1
to 0: scale, zero point and codes of channel c come from the current rows x as without feedback; e = x[c] - decoded
codes, and 0 where that is not finite; for each j < c: x[j] = x[j] - factors[c, j] * e, with the product rounded, and
then the difference.

Layout of the bytes, row-major, one row per token of a head:

    int8   head_dim bytes: token grid two's complement -127..127, channel grid unsigned 0..255
    fp8    head_dim bytes: e4m3 bit patterns
    int4   head_dim / 2 bytes, packed along head_dim in chunks of 32 channels (the last one may be 8, 16 or 24): byte j
           of a chunk of 2h channels holds channel j in its low and channel h + j in its high nibble.
           Examples, code of channel c = c % 16:
           head_dim 8:   40 51 62 73
           head_dim 32:  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
           head_dim 40:  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff | 40 51 62 73
    int2   head_dim / 4 bytes in the same chunks: byte j of a chunk of 4h channels holds the channels j, h + j, 2h + j
           and 3h + j, in pairs of bits from low to high. Examples, code of channel c = c % 4:
           head_dim 8:   88 dd
           head_dim 32:  00 55 aa ff 00 55 aa ff
           head_dim 40:  00 55 aa ff 00 55 aa ff | 88 dd
    int3   head_dim / 4 bytes with the two low bits of all codes, as int2, then head_dim / 8 bytes with the high bits,
           in the same chunks: byte j of a chunk of 8h channels holds the channels j, h + j, .., 7h + j, a bit each
           from low to high. Examples, code of channel c = c % 8:
           head_dim 8:   88 dd | f0
           head_dim 32:  00 55 aa ff 00 55 aa ff | aa aa aa aa
           head_dim 40:  00 55 aa ff 00 55 aa ff 88 dd | aa aa aa aa f0
           In these chunks a shift and a mask turn a word of 8 bytes of low bits into 8 bytes of int4, and a word of 4
           bytes of high bits into those of 4 bytes of int4, so kernels for a CPU need no shuffles.
    scale  token grid [.., kv_len, head_dim / group_size], channel grid [.., blocks, head_dim]; zero_point like scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from .message import told

FP16_MAX = 65504.0
# head_dim and group_size are multiples of this number; compiled backends take multiples of 16.
HEAD_DIM_MULTIPLE = 8
PACKED_CHUNK = 32
GRIDS = ("token", "channel")


@dataclass(frozen=True)
class Format:
    """A format of stored elements. `reach`: the largest code magnitude on the symmetric (token) grid; `levels`: the
    number of steps between smallest and largest code on the channel grid, or None where that grid is symmetric too.

    Formats of less than 8 bits are packed. Their codes are unsigned on both grids: on the token grid a code stands for
    code - reach, which is never zero.

    `token_span`, `channel_span`: the share of the elements' range that the codes span. With few codes a range that
    leaves out the extremes, which then have the outermost codes, has less error as a whole (eval/results/NOTES.md).
    Decoded elements that are encoded again, as after a long crop into a block, move by up to half a step then."""

    name: str
    bits: int
    reach: float
    levels: int | None
    code_of_zero: int
    token_span: float = 1.0
    channel_span: float = 1.0

    @property
    def is_packed(self) -> bool:
        return self.bits < 8


FORMATS = {
    "int8": Format("int8", bits=8, reach=127.0, levels=255, code_of_zero=0),
    "fp8": Format("fp8", bits=8, reach=448.0, levels=None, code_of_zero=0),
    "int4": Format("int4", bits=4, reach=7.5, levels=15, code_of_zero=8),
    "int3": Format("int3", bits=3, reach=3.5, levels=7, code_of_zero=4, token_span=0.9, channel_span=0.93),
    "int2": Format("int2", bits=2, reach=1.5, levels=3, code_of_zero=2, token_span=0.75, channel_span=0.85),
}
DENSE = "dense"


@dataclass(frozen=True)
class QuantSpec:
    """How one side (keys or values) is stored.

    Args:
        format: "int8", "fp8", "int4", "int3", "int2", or "dense" (kept in the model's dtype).
        grid: "token" or "channel".
        group_size: token grid: channels that share a scale, a multiple of 8 that divides head_dim; None = whole head.
        block_length: channel grid: tokens that share a channel's scale, a power of two from 16 to 256 (64 if None).
        rotate: token grid: store the Hadamard transform along head_dim.

    Its `code` is the spec in one word, as operators take it: "int8:token:64:rotate", "int4:channel:64", "dense".

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    format: str
    grid: str = "token"
    group_size: int | None = None
    block_length: int | None = None
    rotate: bool = False

    if TYPE_CHECKING:
        # Set by `__post_init__`; it is no field.
        @property
        def code(self) -> str: ...

    def __post_init__(self) -> None:
        def refuse(field: str, expected: str) -> NoReturn:
            raise ValueError(f"{field}: {told(getattr(self, field))} is not allowed; expected {expected}")

        if not isinstance(self.format, str) or (self.format != DENSE and self.format not in FORMATS):
            refuse("format", f"one of {[*FORMATS, DENSE]}")
        if self.grid not in GRIDS:
            refuse("grid", f"one of {list(GRIDS)}")
        if not isinstance(self.rotate, bool):
            refuse("rotate", "true or false")
        for field in ("group_size", "block_length"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                refuse(field, "an integer or null")
        if self.format == DENSE:
            for field in ("group_size", "block_length"):
                if getattr(self, field) is not None:
                    refuse(field, "null when format is dense")
            if self.grid != "token":
                refuse("grid", "token when format is dense")
            if self.rotate:
                refuse("rotate", "false when format is dense")
        elif self.grid == "token":
            if self.block_length is not None:
                refuse("block_length", "null on the token grid (it belongs to the channel grid)")
            if self.group_size is not None and (self.group_size <= 0 or self.group_size % HEAD_DIM_MULTIPLE):
                refuse("group_size", f"null (whole head) or a positive multiple of {HEAD_DIM_MULTIPLE}")
        else:
            if self.group_size is not None:
                refuse("group_size", "null on the channel grid (it belongs to the token grid)")
            if self.rotate:
                refuse("rotate", "false on the channel grid (its scales follow the channels already)")
            if self.block_length is None:
                object.__setattr__(self, "block_length", 64)
            if self.block_length not in (16, 32, 64, 128, 256):
                refuse("block_length", "one of 16, 32, 64, 128, 256")
        # Computed once, because every call of an operator needs it.
        object.__setattr__(self, "code", self._code())

    @property
    def is_dense(self) -> bool:
        return self.format == DENSE

    @property
    def is_channel(self) -> bool:
        return self.grid == "channel"

    @property
    def has_zero_point(self) -> bool:
        return self.is_channel and FORMATS[self.format].levels is not None

    def resolve(self, head_dim: int) -> QuantSpec:
        """The same spec with `group_size` filled in and checked for this head_dim.

        Raises:
            ValueError: head_dim is not a multiple of 8, or group_size does not divide it.
        """
        if self.is_dense:
            return self
        if head_dim <= 0 or head_dim % HEAD_DIM_MULTIPLE:
            raise ValueError(f"head_dim: {head_dim} cannot be quantized; expected a multiple of {HEAD_DIM_MULTIPLE}")
        if self.is_channel:
            return self
        group_size = head_dim if self.group_size is None else self.group_size
        if head_dim % group_size:
            raise ValueError(f"group_size: {group_size} does not divide head_dim {head_dim}; expected a divisor of it")
        return replace(self, group_size=group_size)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one token's codes in one head (quantized formats)."""
        return head_dim * FORMATS[self.format].bits // 8

    def num_scales(self, head_dim: int) -> int:
        """The number of scales in one row: one per group of a token, or one per channel of a block."""
        return head_dim if self.is_channel else head_dim // (self.group_size or head_dim)

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per cached element, with scales and zero points; a dense side has no bits of its own."""
        if self.is_dense:
            raise ValueError("format: 'dense' has the model's own width; bits_per_element needs a quantized format")
        overhead = 16 * (2 if self.has_zero_point else 1)
        share = self.block_length if self.is_channel else (self.group_size or head_dim)
        return FORMATS[self.format].bits + overhead / share

    def _code(self) -> str:
        if self.is_dense:
            return DENSE
        if self.is_channel:
            return f"{self.format}:channel:{self.block_length}"
        return f"{self.format}:token:{self.group_size or 0}" + (":rotate" if self.rotate else "")

    @staticmethod
    @lru_cache(maxsize=None)
    def from_code(code: str) -> QuantSpec:
        """The inverse of `code`."""
        if code == DENSE:
            return QuantSpec(DENSE)
        format, grid, length, *rotate = code.split(":")
        if grid == "channel":
            return QuantSpec(format, grid, block_length=int(length))
        return QuantSpec(format, grid, group_size=int(length) or None, rotate=rotate == ["rotate"])


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Stored bytes of `[batch, num_kv_heads, kv_len, head_dim]`.

    `data` uint8 `[batch, num_kv_heads, kv_len, row_bytes]`, `scale` and `zero_point` float16 (shapes in the module's
    docstring; zero_point only on the channel grid of integer formats). `spec` is resolved: its group_size is set.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: QuantSpec
    head_dim: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.head_dim))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.zero_point) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The lossy copy `[batch, num_kv_heads, kv_len, head_dim]`, computed in float32, rotation undone."""
        codes = unpack(self.data, self.spec, self.head_dim)
        scale = self.scale.float()
        if self.spec.is_channel:
            kv_len, length = codes.shape[-2], self.spec.block_length
            scale = scale.repeat_interleave(length, dim=-2)[..., :kv_len, :]
            x = codes * scale
            if self.zero_point is not None:
                x = self.zero_point.float().repeat_interleave(length, dim=-2)[..., :kv_len, :] + x
        else:
            x = (codes.unflatten(-1, (-1, self.spec.group_size)) * scale[..., None]).flatten(-2)
        return (rotate(x) if self.spec.rotate else x).to(dtype)


def quantize(
    x: torch.Tensor, spec: QuantSpec, padding: torch.Tensor | None = None, factors: torch.Tensor | None = None
) -> QuantizedTensor:
    """Quantize `x` `[batch, num_kv_heads, kv_len, head_dim]` (any float dtype).

    On the channel grid a last, shorter block gets its own scales, and tokens marked True in `padding`
    `[batch, kv_len]` do not influence the scales.

    Args:
        factors: the channel grid's error feedback, float32 `[num_kv_heads, head_dim, head_dim]`, zero on and above the
            diagonal: what a unit of error of the channel of a row takes from the channel of a column. Channels are
            quantized from the last to the first, each as those after it have left it.

    Raises:
        ValueError: the spec is dense, or does not fit head_dim; or the factors do not fit.
    """
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"spec: {told(spec)} is not allowed; expected a QuantSpec")
    if spec.is_dense:
        raise ValueError("format: 'dense' is not a quantized format; expected one of " + str(list(FORMATS)))
    head_dim = x.shape[-1]
    spec = spec.resolve(head_dim)
    x = x.detach().float()
    if factors is not None:
        check_factors("factors", factors, spec, x.shape[1], head_dim)
    if spec.is_channel:
        codes, scale, zero_point = _quantize_channels(x, spec, padding, factors)
    else:
        codes, scale = _quantize_tokens(rotate(x) if spec.rotate else x, spec)
        zero_point = None
    return QuantizedTensor(pack(codes, spec), scale, zero_point, spec, head_dim)


def _quantize_tokens(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (float32, exact) like `x`, and scales; a group with a NaN or infinity gets scale NaN and codes of zero."""
    form = FORMATS[spec.format]
    groups = x.unflatten(-1, (-1, spec.group_size))
    absmax = groups.abs().amax(-1, keepdim=True)
    scale = (absmax * _float32(form.token_span / form.reach)).clamp(max=FP16_MAX).to(torch.float16)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    r = 1 / scale.float()
    if form.is_packed:
        codes = (groups * r + form.reach).round().clamp(0, form.levels)
    else:
        codes = _symmetric_codes(groups * r, spec.format)
    codes = torch.where(r.isfinite(), codes, float(form.code_of_zero))
    return codes.flatten(-2), scale.squeeze(-1)


class Factors(NamedTuple):
    """The factors of error feedback (see `quantize`) of keys and of values; None: no feedback. Copies of a cache
    share them."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Factors:
        return self


NO_FACTORS = Factors()


def check_factors(name: str, factors: torch.Tensor, spec: QuantSpec, num_kv_heads: int, head_dim: int) -> None:
    """Check the factors of error feedback against the side that they belong to.

    Raises:
        ValueError: the side is not on the channel grid, or the factors have another shape or dtype.
    """
    shape = (num_kv_heads, head_dim, head_dim)
    if not spec.is_channel or factors.shape != shape or factors.dtype != torch.float32:
        raise ValueError(
            f"{name}: {tuple(factors.shape)} of {factors.dtype} is not allowed for {spec.code}; expected {shape} of "
            "torch.float32 on the channel grid"
        )


def _quantize_channels(
    x: torch.Tensor, spec: QuantSpec, padding: torch.Tensor | None, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points per channel of each block."""
    length, kv_len = spec.block_length, x.shape[-2]
    tokens = torch.ones(x.shape[0], kv_len, dtype=torch.bool, device=x.device) if padding is None else ~padding
    pad = -kv_len % length
    blocks = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, length))
    tokens = torch.nn.functional.pad(tokens, (0, pad)).unflatten(-1, (-1, length))[:, None, :, :, None]
    if factors is None:
        codes, scale, zero_point = _quantize_blocks(blocks, tokens, spec)
    else:
        # A copy whose channels are contiguous.
        blocks, channels = blocks.mT.clone(memory_format=torch.contiguous_format).mT, []
        for c in reversed(range(x.shape[-1])):
            channel = blocks[..., c, None]
            code, scale, zero_point = found = _quantize_blocks(channel, tokens, spec)
            channels.append(found)
            decoded = code * scale.float()
            error = channel - (decoded if zero_point is None else zero_point.float() + decoded)
            error = torch.where(error.isfinite(), error, 0.0)
            blocks[..., :c] -= factors[:, None, None, c, :c] * error
        codes, scale, zero_point = (None if x[0] is None else torch.cat(x, dim=-1) for x in zip(*reversed(channels)))
    codes = codes.flatten(-3, -2)[..., :kv_len, :]
    return codes, scale.squeeze(-2), None if zero_point is None else zero_point.squeeze(-2)


def _quantize_blocks(
    blocks: torch.Tensor, tokens: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of whole blocks `[.., block_length, channels]`; their scales and zero points `[.., 1, channels]`, which
    ignore non-finite elements and rows that are False in `tokens`."""
    form = FORMATS[spec.format]
    counted = blocks.isfinite() & tokens
    empty = ~counted.any(-2, keepdim=True)
    step = _float32(1 / (form.levels or form.reach))
    if form.levels is None:
        absmax = torch.where(counted, blocks.abs(), 0.0).amax(-2, keepdim=True)
        scale = (absmax * step).clamp(max=FP16_MAX).to(torch.float16)
        r = 1 / scale.float()
        codes = _symmetric_codes(blocks * r, spec.format)
        zero_point = None
    else:
        # Adding 0 turns -0 into +0; which of the two the search returns depends on its order.
        low = torch.where(counted, blocks, torch.inf).amin(-2, keepdim=True).masked_fill(empty, 0.0) + 0.0
        high = torch.where(counted, blocks, -torch.inf).amax(-2, keepdim=True).masked_fill(empty, 0.0) + 0.0
        if form.channel_span < 1:
            # The difference of two products, because high - low may overflow.
            part = _float32((1 - form.channel_span) / 2)
            margin = high * part - low * part
            low, high = low + margin, high - margin
        zero_point = low.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
        scale = ((high - zero_point.float()) * step).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
        r = 1 / scale.float()
        codes = ((blocks - zero_point.float()) * r).round().clamp(0, form.levels)
    return torch.where(r.isfinite() & ~blocks.isnan(), codes, 0.0), scale, zero_point


def _symmetric_codes(ratio: torch.Tensor, format: str) -> torch.Tensor:
    if format == "fp8":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return ratio.round().clamp(-127, 127)


def _float32(x: float) -> float:
    """The float32 nearest to `x`, so that a Python scalar multiplies as a float32 constant would."""
    return torch.tensor(x, dtype=torch.float32).item()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Normalised Hadamard transform of float32 `x` `[.., head_dim]` along the last axis, its own inverse.

    Block-diagonal over the largest power of two that divides head_dim (80 -> 16, 96 -> 32, 192 -> 64). Butterflies of
    stride 1, 2, 4, .. and one product at the end, in this order, because the bytes depend on the rounding.
    Source: QuaRot, https://arxiv.org/abs/2404.00456.
    """
    head_dim = x.shape[-1]
    block = rotation_block(head_dim)
    stride = 1
    while stride < block:
        pairs = x.unflatten(-1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return x * _float32(block**-0.5)


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides head_dim: the size of the Hadamard matrices along its diagonal."""
    return head_dim & -head_dim


def pack(codes: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Bytes uint8 `[.., row_bytes]` of codes `[.., head_dim]` (integers or fp8 values, exact in float32)."""
    if spec.format == "fp8":
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)
    if spec.format == "int8":
        return codes.to(torch.uint8) if spec.is_channel else codes.to(torch.int8).view(torch.uint8)
    codes = codes.to(torch.uint8)
    planes = [_pack_plane(codes >> shift & (1 << bits) - 1, bits) for shift, bits in _planes(spec)]
    return torch.cat(planes, dim=-1)


def unpack(data: torch.Tensor, spec: QuantSpec, head_dim: int) -> torch.Tensor:
    """The values that stored codes encode before scaling, float32 `[.., head_dim]` (token int4: code - 7.5)."""
    if spec.format == "fp8":
        return data.view(torch.float8_e4m3fn).float()
    if spec.format == "int8":
        return data.float() if spec.is_channel else data.view(torch.int8).float()
    assert data.shape[-1] == spec.row_bytes(head_dim), (data.shape, head_dim)
    planes = data.split([head_dim * bits // 8 for _, bits in _planes(spec)], dim=-1)
    parts = [_unpack_plane(plane, bits) << shift for plane, (shift, bits) in zip(planes, _planes(spec))]
    codes = reduce(torch.bitwise_or, parts).float()
    return codes if spec.is_channel else codes - FORMATS[spec.format].reach


def _planes(spec: QuantSpec) -> list[tuple[int, int]]:
    """The planes of a row of a packed format, in their order: the lowest bit of a code in them, and how many bits."""
    bits = FORMATS[spec.format].bits
    return [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]


def _pack_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    chunks = [chunk.unflatten(-1, (8 // bits, -1)).unbind(-2) for chunk in codes.split(PACKED_CHUNK, dim=-1)]
    packed = [reduce(torch.bitwise_or, (code << bits * i for i, code in enumerate(chunk))) for chunk in chunks]
    return torch.cat(packed, dim=-1)


def _unpack_plane(data: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = range(0, 8, bits)
    chunks = data.split(PACKED_CHUNK * bits // 8, dim=-1)
    return torch.cat([chunk >> shift & (1 << bits) - 1 for chunk in chunks for shift in shifts], dim=-1)
