"""The stored bytes: hand-computed cases, a second implementation in NumPy, and properties of any input."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from hf_kvquant import FORMATS, QuantizedTensor, QuantSpec, quantization, quantize
from hf_kvquant.quantization import pack, rotate, unpack

TOKEN = {
    "int8": QuantSpec("int8"),
    "int8-g32": QuantSpec("int8", group_size=32),
    "int8-g16-rotate": QuantSpec("int8", group_size=16, rotate=True),
    "fp8": QuantSpec("fp8"),
    "fp8-g32-rotate": QuantSpec("fp8", group_size=32, rotate=True),
    "int4": QuantSpec("int4"),
    "int4-g32-rotate": QuantSpec("int4", group_size=32, rotate=True),
    "int3": QuantSpec("int3"),
    "int2-g16-rotate": QuantSpec("int2", group_size=16, rotate=True),
}
CHANNEL = {
    "int8-b64": QuantSpec("int8", "channel"),
    "int8-b16": QuantSpec("int8", "channel", block_length=16),
    "fp8-b64": QuantSpec("fp8", "channel"),
    "int4-b64": QuantSpec("int4", "channel"),
    "int4-b32": QuantSpec("int4", "channel", block_length=32),
    "int3-b32": QuantSpec("int3", "channel", block_length=32),
    "int2-b64": QuantSpec("int2", "channel"),
}
SPECS = {**TOKEN, **CHANNEL}
HEAD_DIMS = [8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 192, 256]
TOLERANCE = {
    "rotate": 1e-5,  # a share of the vector's norm: a few float32 roundings per butterfly
    "half step": 1.002,  # half a step, plus the roundings of the scale to FP16 (2^-11) and of float32 arithmetic
}


def by_id(specs: dict):
    return pytest.mark.parametrize("spec", specs.values(), ids=specs.keys())


def one_token(*numbers: float, head_dim: int = 16) -> torch.Tensor:
    """`[1, 1, 1, head_dim]`, filled up with zeros."""
    return torch.tensor([*numbers] + [0.0] * (head_dim - len(numbers))).view(1, 1, 1, -1)


def hex_of(x: torch.Tensor) -> str:
    return x.contiguous().view(torch.uint8).numpy().tobytes().hex(" ")


def fp16_bits(x: torch.Tensor) -> list[int]:
    return [int(bits) & 0xFFFF for bits in x.contiguous().view(torch.int16).flatten()]


def same_bytes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = ((a.data, b.data), (a.scale, b.scale), (a.zero_point, b.zero_point))
    return all((x is None and y is None) or hex_of(x) == hex_of(y) for x, y in pairs)


class TestByHand:
    """Every figure here was derived from the rules on paper; none was copied from a run."""

    def test_int8_token(self):
        # absmax 127, times 1/127 = 1.0: scale 0x3c00 (1.0), so codes are the elements, halves to even.
        x = one_token(127, -127, 0, 1, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, 64.5, 126.49, -126.51, 3, -3)
        q = quantize(x, QuantSpec("int8"))
        assert fp16_bits(q.scale) == [0x3C00]
        assert hex_of(q.data) == "7f 81 00 01 00 02 02 00 fe fe 40 40 7e 81 03 fd"
        assert q.zero_point is None

    def test_int8_token_two_groups(self):
        # First group: absmax 254 -> scale 2.0 = 0x4000, codes x / 2. Second: absmax 63.5 -> scale 0.5 = 0x3800, x * 2.
        x = one_token(254, -254, 1, 3, 5, -1, head_dim=32)
        x[..., 16:20] = torch.tensor([63.5, -63.5, 0.25, 0.75])
        q = quantize(x, QuantSpec("int8", group_size=16))
        assert fp16_bits(q.scale) == [0x4000, 0x3800]
        # 1/2 -> 0, 3/2 -> 2, 5/2 -> 2, -1/2 -> 0; 0.25 * 2 = 0.5 -> 0, 0.75 * 2 = 1.5 -> 2
        assert hex_of(q.data[..., :6]) == "7f 81 00 02 02 00"
        assert hex_of(q.data[..., 16:20]) == "7f 81 00 02"

    def test_fp8_token(self):
        # absmax 448 -> scale 1.0. e4m3: bias 7, three bits of mantissa, smallest subnormal 2^-9.
        # 448 = 1.75 * 2^8: 1111.110 = 7e; 1 = 0111.000 = 38; 2^-10 is a tie of 00 and 01: even, 00; 3 * 2^-10 of 01
        # and 02: 02; 1.0625 of 38 and 39: 38; 1.1875 of 39 and 3a: 3a; 240 = 1.875 * 2^7 = 1110.111 = 77; 248 of 77
        # and 78: 78; 432 of 7d (416 = 1.625 * 2^8) and 7e (448): 7e; 440 is nearer to 448.
        x = one_token(448, -448, 1, -1, 2**-9, 2**-10, 3 * 2**-10, 1.0625, 1.1875, 240, 248, -0.5, 2**-6, 0, 432, 440)
        q = quantize(x, QuantSpec("fp8"))
        assert fp16_bits(q.scale) == [0x3C00]
        assert hex_of(q.data) == "7e fe 38 b8 01 00 02 38 3a 77 78 b0 08 00 7e 7e"

    def test_int4_token(self):
        # absmax 7.5 -> scale 1.0; code = rint(x + 7.5). Packed: byte j holds channel j (low) and 16 + j (high).
        low = [7.5, -7.5, 0, 1, 2, -1, -2, 0.4, -0.4, 7, 6.9, -7, 3.2, -3.2, 5, -5]
        # x + 7.5:  15, 0, 7.5, 8.5, 9.5, 6.5, 5.5, 7.9, 7.1, 14.5, 14.4, 0.5, 10.7, 4.3, 12.5, 2.5
        codes = [15, 0, 8, 8, 10, 6, 6, 8, 7, 14, 14, 0, 11, 4, 12, 2]
        high = [-6.0] * 16  # 1.5 -> 2
        q = quantize(one_token(*low, *high, head_dim=32), QuantSpec("int4"))
        assert fp16_bits(q.scale) == [0x3C00]
        assert hex_of(q.data) == " ".join(f"2{code:x}" for code in codes)
        assert q.dequantize().flatten()[:4].tolist() == [7.5, -7.5, 0.5, 0.5]

    def test_int3_token(self):
        # absmax 3.89 -> scale 0.9 * 3.89 / 3.5 = 1.0003, in FP16 1.0; code = rint(x + 3.5): 7.39, -0.39, 3.5, 4.5,
        # 5.5, 2.5, 1.5, 3.9 become 7, 0, 4, 4, 6, 2, 2, 4. Low bits 3, 0, 0, 0, 2, 2, 2, 0: the bytes 3 + 0 + 2 * 16
        # + 2 * 64 (channels 0, 2, 4, 6) and 2 * 16 (1, 3, 5, 7). High bits of the channels 0, 2, 3, 4 and 7: 1 + 4 + 8
        # + 16 + 128.
        q = quantize(one_token(3.89, -3.89, 0, 1, 2, -1, -2, 0.4, head_dim=8), QuantSpec("int3"))
        assert fp16_bits(q.scale) == [0x3C00]
        assert hex_of(q.data) == "a3 20 9d"
        assert q.dequantize().flatten().tolist() == [3.5, -3.5, 0.5, 0.5, 2.5, -1.5, -1.5, 0.5]

    def test_int2_token(self):
        # absmax 2 -> scale 0.75 * 2 / 1.5 = 1.0; code = rint(x + 1.5): 3.5, -0.5, 1.5, 2.5, 0.5, 1.9, 1.1, 0.9 become
        # 3, 0, 2, 2, 0, 2, 1, 1: the bytes 3 + 2 * 4 + 0 * 16 + 1 * 64 (channels 0, 2, 4, 6) and 2 * 4 + 2 * 16
        # + 1 * 64 (1, 3, 5, 7).
        q = quantize(one_token(2, -2, 0, 1, -1, 0.4, -0.4, -0.6, head_dim=8), QuantSpec("int2"))
        assert fp16_bits(q.scale) == [0x3C00]
        assert hex_of(q.data) == "4b 68"
        assert q.dequantize().flatten().tolist() == [1.5, -1.5, 0.5, 0.5, -1.5, 0.5, -0.5, -0.5]

    def test_int8_channel(self):
        # Channel 0: 0..255 in steps of 17 -> zero 0, scale 255 / 255 = 1.0. Channel 1: 100 + the half of it -> zero
        # 100 = 0x5640, scale 0.5. Channel 2: constant 3 -> zero 3.0 = 0x4200, scale 0, codes 0. Channel 3: -255..0.
        ramp = torch.arange(16.0) * 17
        x = torch.zeros(1, 1, 16, 16)
        x[..., 0], x[..., 1], x[..., 2], x[..., 3] = ramp, 100 + ramp / 2, 3.0, -ramp
        q = quantize(x, QuantSpec("int8", "channel", block_length=16))
        assert fp16_bits(q.zero_point)[:5] == [0x0000, 0x5640, 0x4200, 0xDBF8, 0x0000]  # -255 = -1.9921875 * 2^7
        assert fp16_bits(q.scale)[:5] == [0x3C00, 0x3800, 0x0000, 0x3C00, 0x0000]
        expected = [(17 * t, 17 * t, 0, 255 - 17 * t, 0) for t in range(16)]
        assert [tuple(row[:5]) for row in q.data[0, 0].tolist()] == expected
        assert torch.equal(q.dequantize(), x)

    def test_int4_channel(self):
        # Channel 0: -3.75 + t / 2 for t = 0..15: zero -3.75 = 0xc380, scale 7.5 / 15 = 0.5, code t, packed with
        # channel 8 (head_dim 16: one chunk of two halves of 8), which counts down: code 15 - t.
        steps = torch.arange(16.0) / 2
        x = torch.zeros(1, 1, 16, 16)
        x[..., 0], x[..., 8] = steps - 3.75, 3.75 - steps
        q = quantize(x, QuantSpec("int4", "channel", block_length=16))
        assert fp16_bits(q.zero_point)[0] == fp16_bits(q.zero_point)[8] == 0xC380
        assert fp16_bits(q.scale)[0] == fp16_bits(q.scale)[8] == 0x3800
        assert q.data[0, 0, :, 0].tolist() == [(15 - t) << 4 | t for t in range(16)]
        assert torch.equal(q.dequantize(), x)

    def test_int3_channel(self):
        # Channel 0: -1.75 + t / 2 for t = 0..7, twice, with the extremes moved to 3.5 / 0.93 / 2 = 1.8817, so that a
        # margin of 0.035 of the range is 0.1317: zero -1.75 = 0xbf00, scale 3.5 / 7 = 0.5, code t % 8. Its low
        # bits are the lowest of byte 0, its high bit that of byte 2. Channel 5 counts down: bits 4 and 5 of byte 1,
        # and bit 5 of byte 2.
        steps = torch.arange(16.0) % 8 / 2 - 1.75
        x = torch.zeros(1, 1, 16, 8)
        x[..., 0], x[..., 5] = steps, -steps
        x = torch.where(x.abs() == 1.75, x.sign() * 1.8817, x)
        q = quantize(x, QuantSpec("int3", "channel", block_length=16))
        assert fp16_bits(q.zero_point)[0] == fp16_bits(q.zero_point)[5] == 0xBF00
        assert fp16_bits(q.scale)[0] == fp16_bits(q.scale)[5] == 0x3800
        up, down = [t % 8 for t in range(16)], [7 - t % 8 for t in range(16)]
        assert q.data[0, 0].tolist() == [[a & 3, (b & 3) << 4, a >> 2 | b >> 2 << 5] for a, b in zip(up, down)]
        assert torch.equal(q.dequantize(), x.clamp(-1.75, 1.75))

    def test_int2_channel(self):
        # Channel 0: -0.75 + t / 2 for t = 0..3, four times, with the extremes moved to 1.5 / 0.85 / 2 = 0.8824: the
        # margin is 0.075 of the range, 0.1324, zero -0.75 = 0xba00, scale 1.5 / 3 = 0.5, code t % 4, the lowest bits
        # of byte 0. Channel 7 counts down: the highest bits of byte 1.
        steps = torch.arange(16.0) % 4 / 2 - 0.75
        x = torch.zeros(1, 1, 16, 8)
        x[..., 0], x[..., 7] = steps, -steps
        x = torch.where(x.abs() == 0.75, x.sign() * 0.8824, x)
        q = quantize(x, QuantSpec("int2", "channel", block_length=16))
        assert fp16_bits(q.zero_point)[0] == fp16_bits(q.zero_point)[7] == 0xBA00
        assert fp16_bits(q.scale)[0] == fp16_bits(q.scale)[7] == 0x3800
        assert q.data[0, 0].tolist() == [[t % 4, (3 - t % 4) << 6] for t in range(16)]
        assert torch.equal(q.dequantize(), x.clamp(-0.75, 0.75))

    def test_fp8_channel(self):
        # Symmetric, one scale per channel: absmax 896 -> scale 2.0, 896 / 2 = 448 = 7e; 2 / 2 = 1 = 38.
        x = torch.zeros(1, 1, 16, 16)
        x[0, 0, :3, 5] = torch.tensor([-896.0, 2.0, -1.0])
        q = quantize(x, QuantSpec("fp8", "channel", block_length=16))
        assert q.zero_point is None
        assert fp16_bits(q.scale) == [0] * 5 + [0x4000] + [0] * 10
        assert hex_of(q.data[0, 0, :4, 5]) == "fe 38 b0 00"

    def test_zero_point_above_the_minimum(self):
        # 1000.3 lies between the FP16 neighbours 1000.0 and 1000.5: zero is above every element of the channel. The
        # scale is -0.2 / 255 = -0.00078436 = -1.60637 * 2^-11, mantissa 620.93 -> 621 = 0x26d: 0x926d; 254.988 -> 255.
        x = torch.full((1, 1, 16, 16), 1000.3)
        q = quantize(x, QuantSpec("int8", "channel", block_length=16))
        assert set(fp16_bits(q.zero_point)) == {0x63D1}  # 1000.5 = 1.9541015625 * 2^9, mantissa 977 = 0x3d1
        assert set(fp16_bits(q.scale)) == {0x926D}
        assert set(q.data.flatten().tolist()) == {255}
        assert torch.allclose(q.dequantize(), x, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("format", "bytes_"), [("int8", {0}), ("fp8", {0}), ("int4", {0x88}), ("int3", {0, 0xFF}), ("int2", {0xAA})]
    )
    def test_zeros_on_the_token_grid(self, format, bytes_):
        q = quantize(torch.zeros(1, 2, 3, 32), QuantSpec(format))
        assert set(fp16_bits(q.scale)) == {0}
        assert set(q.data.flatten().tolist()) == bytes_
        assert torch.equal(q.dequantize(), torch.zeros(1, 2, 3, 32))

    def test_subnormal_scales(self):
        # FP16's smallest value is 2^-24 (0x0001); 2^-25 is a tie with 0 (even), 3 * 2^-25 a tie of 1 and 2 (even: 2).
        # A scale that becomes 0 stores the code of 0 for every element.
        exponents = {2.0**-24: 0x0001, 2.0**-25: 0x0000, 3 * 2.0**-25: 0x0002, 2.0**-15: 0x0200}
        for scale, bits in exponents.items():
            q = quantize(one_token(127 * scale, -64 * scale), QuantSpec("int8"))
            assert fp16_bits(q.scale) == [bits], scale
            largest = {0x0001: "7f c0", 0x0000: "00 00", 0x0002: "5f d0", 0x0200: "7f c0"}[bits]
            # for 0x0002: 127 * 1.5 / 2 = 95.25 -> 5f; -64 * 0.75 = -48 -> d0
            assert hex_of(q.data[..., :2]) == largest, scale

    @pytest.mark.parametrize(("format", "codes"), [("int8", "7f 81 20"), ("fp8", "7e fe 60")])
    def test_huge_numbers(self, format, codes):
        # 1e30 / 127 exceeds FP16: scale 65504 = 0x7bff, and codes saturate. 32 * 65504 has the code of 32: 0x20 in
        # int8; in e4m3 32 = 2^5, exponent 5 + 7 = 12, 0.1100.000 = 0x60.
        q = quantize(one_token(1e30, -1e30, 32 * 65504.0), QuantSpec(format))
        assert fp16_bits(q.scale) == [0x7BFF]
        assert hex_of(q.data[..., :3]) == codes

    def test_huge_numbers_on_the_channel_grid(self):
        # zero = -65504; (1e9 + 65504) / 255 exceeds FP16: scale 65504. (0 + 65504) / 65504 = 1.
        x = torch.zeros(1, 1, 16, 16)
        x[0, 0, 0, 0], x[0, 0, 1, 0] = 1e9, -1e9
        q = quantize(x, QuantSpec("int8", "channel", block_length=16))
        assert fp16_bits(q.zero_point)[0] == 0xFBFF
        assert fp16_bits(q.scale)[0] == 0x7BFF
        assert q.data[0, 0, :3, 0].tolist() == [255, 0, 1]

    @pytest.mark.parametrize(("format", "zero"), [("int8", 0x00), ("fp8", 0x00), ("int4", 0x8)])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nonfinite_group_on_the_token_grid(self, format, zero, bad):
        # The group with the NaN or infinity has scale NaN (0x7e00) and codes of zero. The other group is unaffected.
        x = one_token(*[1.0] * 32, head_dim=32)
        clean = quantize(x, QuantSpec(format, group_size=16))
        x[..., 3] = bad
        q = quantize(x, QuantSpec(format, group_size=16))
        assert fp16_bits(q.scale) == [0x7E00, fp16_bits(clean.scale)[1]]
        if format == "int4":
            assert (q.data & 15).unique().tolist() == [zero]
            assert torch.equal(q.data >> 4, clean.data >> 4)
        else:
            assert q.data[..., :16].unique().tolist() == [zero]
            assert torch.equal(q.data[..., 16:], clean.data[..., 16:])
        assert q.dequantize()[..., :16].isnan().all()

    def test_nonfinite_numbers_on_the_channel_grid(self):
        # Statistics of the finite elements 0 and 255: scale 1. Infinity takes the nearest code, NaN code 0.
        x = torch.zeros(1, 1, 16, 16)
        x[0, 0, :4, 0] = torch.tensor([255.0, math.inf, -math.inf, math.nan])
        q = quantize(x, QuantSpec("int8", "channel", block_length=16))
        assert (fp16_bits(q.zero_point)[0], fp16_bits(q.scale)[0]) == (0, 0x3C00)
        assert q.data[0, 0, :5, 0].tolist() == [255, 255, 0, 0, 0]

    def test_channel_without_a_finite_number(self):
        q = quantize(torch.full((1, 1, 16, 16), math.nan), QuantSpec("int4", "channel", block_length=16))
        assert q.dequantize().abs().max() == 0

    def test_negative_zero_is_zero(self):
        # A search may find -0 or +0 first: the zero point is +0 (0x0000) in either order.
        for first in (0, 1):
            x = torch.zeros(1, 1, 16, 16)
            x[0, 0, first::2] = -0.0
            q = quantize(x, QuantSpec("int8", "channel", block_length=16))
            assert set(fp16_bits(q.zero_point)) == {0x0000}
            assert set(q.data.flatten().tolist()) == {0}

    def test_padding_is_no_statistic(self):
        # The padded token's 1e4 would make the scale 39; without it the channel runs from 0 to 255.
        x = torch.zeros(1, 1, 16, 16)
        x[0, 0, :3, 0] = torch.tensor([1e4, 255.0, 17.0])
        padding = torch.zeros(1, 16, dtype=torch.bool)
        padding[0, 0] = True
        q = quantize(x, QuantSpec("int8", "channel", block_length=16), padding)
        assert fp16_bits(q.scale)[0] == 0x3C00
        assert q.data[0, 0, :3, 0].tolist() == [255, 255, 17]

    def test_rotation_of_one_number(self):
        # A unit vector spreads over its block of 16: every entry 1/4, signs of the Hadamard column. Channel 1's column
        # alternates. absmax 4 -> each entry 1.0, scale 1/127, all codes +-127.
        q = quantize(one_token(0, 4.0), QuantSpec("int8", rotate=True))
        assert hex_of(q.data) == " ".join(["7f 81"] * 8)

    @pytest.mark.parametrize(
        ("format", "head_dim", "expected"),
        [
            ("int4", 8, "40 51 62 73"),
            ("int4", 32, "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff"),
            ("int4", 40, "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff 40 51 62 73"),
            ("int2", 8, "88 dd"),
            ("int2", 32, "00 55 aa ff 00 55 aa ff"),
            ("int2", 40, "00 55 aa ff 00 55 aa ff 88 dd"),
            ("int3", 8, "88 dd f0"),
            ("int3", 32, "00 55 aa ff 00 55 aa ff aa aa aa aa"),
            ("int3", 40, "00 55 aa ff 00 55 aa ff 88 dd aa aa aa aa f0"),
        ],
    )
    def test_packing_examples_of_the_docstring(self, format, head_dim, expected):
        packed = pack(torch.arange(head_dim) % (LEVELS[format] + 1), QuantSpec(format))
        assert hex_of(packed) == expected
        lines = [line.split(":")[-1].replace("| ", "").strip() for line in quantization.__doc__.splitlines()]
        assert expected in lines

    def test_packing_of_a_half_chunk(self):
        # head_dim 48: a chunk of 32, then one of 16 with halves of 8. Code of channel c: c // 4.
        packed = pack(torch.arange(48.0) // 4, QuantSpec("int4"))
        whole = "40 40 40 40 51 51 51 51 62 62 62 62 73 73 73 73"
        assert hex_of(packed) == whole + " a8 a8 a8 a8 b9 b9 b9 b9"


# A second implementation, in NumPy float32, straight from the rules: one loop per rule, no shared code.


def e4m3_values() -> np.ndarray:
    """The values of the codes 0x00 .. 0x7e."""
    return np.array([(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)])


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    values, size = e4m3_values(), np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(values, size), 1, 126)
    below = above - 1
    to_above, to_below = values[above] - size, size - values[below]
    nearest = np.where(to_above < to_below, above, below)
    nearest = np.where(to_above == to_below, np.where(above % 2 == 0, above, below), nearest)
    return (nearest | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def numpy_rotate(x: np.ndarray) -> np.ndarray:
    head_dim, block, stride = x.shape[-1], 1, 1
    while head_dim % (2 * block) == 0:
        block *= 2
    while stride < block:
        y = np.empty_like(x)
        for c in range(head_dim):
            other = x[..., c ^ stride]
            y[..., c] = other - x[..., c] if c & stride else x[..., c] + other
        x, stride = y, 2 * stride
    return x * np.float32(block**-0.5)


# Of the packed formats: the lowest bit of a code that each plane of a row holds, and the number of bits.
PLANES = {"int4": [(0, 4)], "int3": [(0, 2), (2, 1)], "int2": [(0, 2)]}


def numpy_pack(codes: np.ndarray, format: str) -> np.ndarray:
    head_dim = codes.shape[-1]
    planes = []
    for low, bits in PLANES[format]:
        packed = np.zeros((*codes.shape[:-1], head_dim * bits // 8), np.uint8)
        for c in range(head_dim):
            chunk = c // 32 * 32
            length = min(32, head_dim - chunk) * bits // 8
            code = codes[..., c] >> low & (2**bits - 1)
            packed[..., chunk * bits // 8 + (c - chunk) % length] |= (code << bits * ((c - chunk) // length)).astype(
                np.uint8
            )
        planes.append(packed)
    return np.concatenate(planes, axis=-1)


REACH = {"int8": 127, "fp8": 448, "int4": 7.5, "int3": 3.5, "int2": 1.5}
LEVELS = {"int8": 255, "int4": 15, "int3": 7, "int2": 3}
# The share of the elements' range that codes span, where it is not all of it.
TOKEN_SPAN, CHANNEL_SPAN = {"int3": 0.9, "int2": 0.75}, {"int3": 0.93, "int2": 0.85}


def numpy_token_grid(x: np.ndarray, format: str, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.zeros(x.shape, np.int64)
    scales = np.zeros((*x.shape[:-1], x.shape[-1] // group_size), np.float16)
    for token in np.ndindex(x.shape[:-1]):
        for g in range(scales.shape[-1]):
            group = x[token][g * group_size : (g + 1) * group_size]
            where = codes[token][g * group_size : (g + 1) * group_size]
            where[:] = {"int4": 8, "int3": 4, "int2": 2}.get(format, 0)
            if not np.isfinite(group).all():
                scales[token][g] = np.nan
                continue
            per_code = np.float32(TOKEN_SPAN.get(format, 1) / REACH[format])
            scale = np.float16(min(np.abs(group).max() * per_code, np.float32(65504)))
            scales[token][g] = scale
            if scale == 0:
                continue
            r = np.float32(1) / np.float32(scale)
            if format == "int8":
                where[:] = np.clip(np.rint(group * r), -127, 127).astype(np.int64) & 0xFF
            elif format in PLANES:
                where[:] = np.clip(np.rint(group * r + np.float32(REACH[format])), 0, LEVELS[format])
            else:
                where[:] = e4m3_codes(np.clip(group * r, np.float32(-448), np.float32(448)))
    return codes, scales


def numpy_channel_grid(x: np.ndarray, format: str, length: int, padding: np.ndarray):
    batch, heads, kv_len, head_dim = x.shape
    codes = np.zeros(x.shape, np.int64)
    scales = np.zeros((batch, heads, -(-kv_len // length), head_dim), np.float16)
    zeros = np.zeros_like(scales)
    limit = np.float32(65504)
    for b, h, block, c in np.ndindex(scales.shape):
        columns = slice(block * length, (block + 1) * length)
        channel = x[b, h, columns, c]
        known = channel[np.isfinite(channel) & ~padding[b, columns]]
        finite = ~np.isnan(channel)
        if format == "fp8":
            absmax = np.abs(known).max() if len(known) else np.float32(0)
            scale = np.float16(min(absmax * np.float32(1 / 448), limit))
        else:
            low, high = (known.min(), known.max()) if len(known) else (np.float32(0), np.float32(0))
            low, high = low + np.float32(0), high + np.float32(0)  # -0 becomes +0
            if format in CHANNEL_SPAN:
                part = np.float32((1 - CHANNEL_SPAN[format]) / 2)
                margin = high * part - low * part
                low, high = low + margin, high - margin
            zero = np.float16(np.clip(low, -limit, limit))
            scale = np.float16(np.clip((high - np.float32(zero)) * np.float32(1 / LEVELS[format]), -limit, limit))
            zeros[b, h, block, c] = zero
        scales[b, h, block, c] = scale
        if scale == 0:
            continue
        r = np.float32(1) / np.float32(scale)
        if format == "fp8":
            code = e4m3_codes(np.clip(np.where(finite, channel, 0) * r, np.float32(-448), np.float32(448)))
        else:
            code = np.clip(np.rint((np.where(finite, channel, 0) - np.float32(zero)) * r), 0, LEVELS[format])
        codes[b, h, columns, c] = np.where(finite, code, 0)
    return codes, scales, zeros


def numpy_bytes(x: torch.Tensor, spec: QuantSpec, padding: torch.Tensor) -> tuple[np.ndarray, ...]:
    numbers = x.float().numpy()
    zeros = np.zeros(0)
    with np.errstate(invalid="ignore", over="ignore"):
        if spec.is_channel:
            codes, scales, zeros = numpy_channel_grid(numbers, spec.format, spec.block_length, padding.numpy())
        else:
            numbers = numpy_rotate(numbers) if spec.rotate else numbers
            codes, scales = numpy_token_grid(numbers, spec.format, spec.group_size or x.shape[-1])
    return (numpy_pack(codes, spec.format) if spec.format in PLANES else codes.astype(np.uint8)), scales, zeros


def harsh(kind: str, x: torch.Tensor) -> torch.Tensor:
    """Inputs at the ends of the range of floats, and with NaN and infinities."""
    if kind == "tiny":  # scales below FP16's normal range, some of them zero
        return x * 10.0 ** -torch.randint(3, 9, (*x.shape[:-1], 1))
    if kind == "huge":  # scales above FP16's largest
        return x * 10.0 ** torch.randint(3, 30, (*x.shape[:-1], 1))
    if kind == "nonfinite":
        bad = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, x.shape)]
        return torch.where(torch.rand_like(x) < 0.01, bad, x)
    if kind == "ties":  # halves of a step, and constant channels
        return (x * 4).round() / 2
    return x


class TestAgainstNumPy:
    @pytest.mark.parametrize("kind", ["plain", "tiny", "huge", "nonfinite", "ties"])
    @by_id(SPECS)
    def test_bytes(self, spec, kind, outlier):
        x = harsh(kind, outlier(2, 2, 67, 96))
        padding = torch.zeros(2, 67, dtype=torch.bool)
        padding[1, :21] = True
        self.check(x, spec, padding)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("format", FORMATS)
    def test_every_head_dim(self, format, head_dim, outlier):
        self.check(outlier(1, 1, 9, head_dim), QuantSpec(format, rotate=True))
        self.check(outlier(1, 1, 9, head_dim), QuantSpec(format, "channel"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["int8", "fp8", "int4-g32-rotate", "int4-b32"])
    def test_every_dtype(self, name, dtype, outlier):
        self.check(outlier(1, 2, 33, 64, dtype=dtype), SPECS[name])

    @by_id({name: SPECS[name] for name in ("int8", "int4", "int3", "int8-b16", "int4-b32")})
    def test_ties_are_decided_by_the_product_with_the_reciprocal(self, spec):
        """For elements half-way between two codes, in every scale from 1 to 2, x * (1 / scale) and x / scale do not
        always give the same code. This test finds a library or compiler that replaces one by the other."""
        length = spec.block_length or 32
        scale = (1 + torch.arange(1024) / 1024)[:, None]
        if spec.is_channel:
            levels, middle = LEVELS[spec.format], 0.0
            codes = torch.randint(0, levels, (1024, length)) + 0.5
            codes[:, :2] = torch.tensor([0.0, levels])  # the smallest and largest element set zero point and scale
        else:
            reach = REACH[spec.format]
            middle = reach if spec.format in PLANES else 0.0
            codes = torch.randint(-int(reach), int(reach), (1024, length)) + (0.5 - middle % 1)
            codes[:, 0] = reach / TOKEN_SPAN.get(spec.format, 1)
        x = codes * scale
        assert ((x * (1 / scale) + middle).round() != (x / scale + middle).round()).any()
        q = self.check((x.T.contiguous() if spec.is_channel else x)[None, None], spec)
        assert torch.equal(q.scale.float().flatten(), scale.flatten())

    def check(self, x: torch.Tensor, spec: QuantSpec, padding: torch.Tensor | None = None) -> QuantizedTensor:
        q = quantize(x, spec, padding)
        padding = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool) if padding is None else padding
        data, scales, zeros = numpy_bytes(x, spec, padding)
        assert q.data.numpy().tobytes() == data.tobytes()
        assert q.scale.shape == scales.shape
        assert fp16_bits(q.scale) == scales.view(np.uint16).flatten().tolist()
        if q.zero_point is not None:
            assert fp16_bits(q.zero_point) == zeros.view(np.uint16).flatten().tolist()
        return q


class TestTokensAreIndependent:
    @by_id(TOKEN)
    def test_bytes_of_a_token_do_not_depend_on_others(self, spec, outlier):
        x = outlier(2, 2, 13, 64)
        whole = quantize(x, spec)
        for t in range(13):
            alone = quantize(x[1:, :, t : t + 1], spec)
            assert torch.equal(alone.data, whole.data[1:, :, t : t + 1])
            assert torch.equal(alone.scale, whole.scale[1:, :, t : t + 1])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @by_id(TOKEN)
    def test_a_bad_token_on_the_token_grid(self, spec, bad, outlier):
        x = outlier(1, 2, 13, 64)
        clean = quantize(x, spec)
        x[0, 1, 5, 7] = bad
        q = quantize(x, spec)
        others = [t for t in range(13) if t != 5]
        assert torch.equal(q.data[:, :, others], clean.data[:, :, others])
        assert torch.equal(q.scale[:, :, others], clean.scale[:, :, others])
        assert torch.equal(q.data[:, 0], clean.data[:, 0])
        assert q.dequantize()[0, 1, 5].isnan().any()
        assert q.dequantize()[:, :, others].isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @by_id(CHANNEL)
    def test_a_bad_token_on_the_channel_grid(self, spec, bad, outlier):
        x = outlier(1, 2, 70, 64)
        x[:, :, 5] = x[:, :, 6]  # the channel's statistics are the same with and without token 5
        clean = quantize(x, spec)
        x[0, 1, 5, :9] = bad
        q = quantize(x, spec)
        others = [t for t in range(70) if t != 5]
        assert torch.equal(q.data[:, :, others], clean.data[:, :, others])
        assert torch.equal(q.scale, clean.scale)
        assert q.zero_point is None or torch.equal(q.zero_point, clean.zero_point)
        assert q.dequantize().isfinite().all()

    @by_id(CHANNEL)
    def test_blocks_are_independent(self, spec, outlier):
        length = spec.block_length
        x = outlier(1, 2, 2 * length + 3, 32)
        whole = quantize(x, spec)
        for block in range(3):
            columns = slice(block * length, (block + 1) * length)
            alone = quantize(x[:, :, columns], spec)
            assert torch.equal(alone.data, whole.data[:, :, columns])
            assert torch.equal(alone.scale[:, :, 0], whole.scale[:, :, block])

    @by_id(CHANNEL)
    def test_padded_tokens_change_nothing(self, spec, outlier):
        x = outlier(2, 1, 70, 32)
        padding = torch.zeros(2, 70, dtype=torch.bool)
        padding[1, :11] = True
        other = x.clone()
        other[1, :, :11] = 1e3 * torch.randn(1, 11, 32)
        a, b = quantize(x, spec, padding), quantize(other, spec, padding)
        assert torch.equal(a.data[:, :, 11:], b.data[:, :, 11:])
        assert torch.equal(a.scale, b.scale)
        assert not torch.equal(a.scale[1], quantize(other, spec).scale[1])

    @by_id(SPECS)
    def test_strides_do_not_matter(self, spec, outlier):
        x = outlier(2, 33, 3, 64).transpose(1, 2)
        assert same_bytes(quantize(x, spec), quantize(x.contiguous(), spec))


class TestRotation:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_equals_the_hadamard_matrix(self, head_dim, outlier):
        block = {24: 8, 40: 8, 48: 16, 80: 16, 96: 32, 112: 16, 192: 64}.get(head_dim, head_dim)
        i = torch.arange(head_dim)
        signs = torch.tensor([[(-1.0) ** (a & b).bit_count() for b in range(block)] for a in range(block)])
        matrix = signs[i % block][:, i % block] * (i[:, None] // block == i // block) / block**0.5
        x = outlier(1, 2, 5, head_dim)
        expected = x.double() @ matrix.double().T
        limit = TOLERANCE["rotate"] * x.double().norm(dim=-1, keepdim=True)
        assert ((rotate(x).double() - expected).abs() <= limit).all()

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_is_its_own_inverse(self, head_dim, outlier):
        x = outlier(1, 2, 5, head_dim)
        assert ((rotate(rotate(x)) - x).abs() <= TOLERANCE["rotate"] * x.norm(dim=-1, keepdim=True)).all()


class TestRoundTrip:
    @by_id(TOKEN)
    def test_error_on_the_token_grid(self, spec, outlier):
        x = outlier(2, 2, 130, 64)
        error = (quantize(x, spec).dequantize() - x).double()
        if spec.rotate:  # the rotated elements are stored
            x, error = rotate(x), rotate(error.float()).double()
        absmax = x.unflatten(-1, (-1, spec.group_size or 64)).abs().amax(-1, keepdim=True)
        span = TOKEN_SPAN.get(spec.format, 1)
        step = span * absmax / REACH[spec.format]
        if spec.format == "fp8":  # half a unit in the last place, or half the smallest subnormal
            limit = torch.maximum(x.abs().unflatten(-1, (step.shape[-2], -1)) * 2**-4, step * 2**-10)
        else:
            # The largest elements lie beyond the outermost codes.
            limit = torch.maximum(step / 2, (1 - span) * absmax).expand(*step.shape[:-1], spec.group_size or 64)
        rounding = 1e-6 * absmax if spec.rotate else 0  # the rounding of rotating back and forth
        assert (error.abs() <= (limit * TOLERANCE["half step"] + rounding).flatten(-2)).all()

    @by_id(CHANNEL)
    def test_error_on_the_channel_grid(self, spec, outlier):
        length = spec.block_length
        x = outlier(2, 2, 2 * length, 64)
        blocks = x.unflatten(2, (-1, length))
        error = (quantize(x, spec).dequantize() - x).unflatten(2, (-1, length)).abs()
        if spec.format == "fp8":
            step = blocks.abs().amax(3, keepdim=True) / 448
            limit = torch.maximum(blocks.abs() * 2**-4, step * 2**-10)
        else:
            low, high = blocks.amin(3, keepdim=True), blocks.amax(3, keepdim=True)
            shift = low.abs() * 2**-11  # the zero point is rounded to FP16
            limit = CHANNEL_SPAN.get(spec.format, 1) * (high - low + shift) / LEVELS[spec.format] / 2 + shift
        assert (error <= limit * TOLERANCE["half step"]).all()

    @by_id({name: spec for name, spec in SPECS.items() if spec.format not in TOKEN_SPAN})
    def test_decoding_and_encoding_again_changes_little(self, spec, outlier):
        """Decoded elements lie on the grid: a second round trip moves them by far less than a step, where codes span
        the whole range."""
        once = quantize(outlier(1, 2, 128, 64), spec).dequantize()
        twice = quantize(once, spec).dequantize()
        assert (twice - once).norm() < 2e-3 * once.norm()

    @pytest.mark.parametrize(("format", "grid", "share"), [
        ("int3", "token", 0.86), ("int3", "channel", 0.91), ("int2", "token", 0.62), ("int2", "channel", 0.77),
    ])  # fmt: skip
    def test_a_span_lowers_the_error_of_normal_elements(self, format, grid, share, monkeypatch):
        x, spec = torch.randn(1, 8, 256, 64), QuantSpec(format, grid)
        errors = [(quantize(x, spec).dequantize() - x).square().mean()]
        whole = dataclasses.replace(FORMATS[format], token_span=1.0, channel_span=1.0)
        monkeypatch.setitem(quantization.FORMATS, format, whole)
        errors.append((quantize(x, spec).dequantize() - x).square().mean())
        assert errors[0] < share * errors[1]

    def test_dtype(self, outlier):
        q = quantize(outlier(1, 1, 3, 32, dtype=torch.bfloat16).requires_grad_(), QuantSpec("int8"))
        assert q.dequantize().dtype == torch.float32
        assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
        assert not q.dequantize().requires_grad


class TestPacking:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @by_id({"int8 token": TOKEN["int8"], "int8 channel": CHANNEL["int8-b64"], "fp8": TOKEN["fp8"]})
    def test_bytes(self, spec, head_dim):
        """Every byte that is not NaN comes back as the same byte."""
        data = torch.randint(0, 256, (3, 2, 5, head_dim), dtype=torch.uint8)
        if spec.format == "fp8":
            data[(data & 0x7F) == 0x7F] = 0
        assert torch.equal(pack(unpack(data, spec, head_dim), spec), data)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @by_id({name: SPECS[name] for name in ("int4", "int4-b64", "int3", "int3-b32", "int2-g16-rotate", "int2-b64")})
    def test_packed_codes(self, spec, head_dim):
        codes = torch.randint(0, LEVELS[spec.format] + 1, (3, 2, 5, head_dim)).float()
        data = pack(codes, spec)
        assert data.shape == (3, 2, 5, spec.row_bytes(head_dim))
        assert torch.equal(unpack(data, spec, head_dim), codes - (0 if spec.is_channel else REACH[spec.format]))
        assert np.array_equal(data.numpy(), numpy_pack(codes.long().numpy(), spec.format))


class TestQuantizedTensor:
    @pytest.mark.parametrize(
        ("spec", "kv_len", "head_dim", "nbytes"),
        [
            # batch 2, heads 3: six rows of tokens
            (QuantSpec("int8", group_size=64), 10, 128, 6 * 10 * (128 + 2 * 2)),
            (QuantSpec("fp8"), 10, 80, 6 * 10 * (80 + 2)),
            (QuantSpec("int4", group_size=32), 1, 96, 6 * 1 * (48 + 3 * 2)),
            (QuantSpec("int8", "channel"), 130, 64, 6 * (130 * 64 + 3 * 64 * 4)),
            (QuantSpec("int4", "channel", block_length=128), 256, 64, 6 * (256 * 32 + 2 * 64 * 4)),
            (QuantSpec("fp8", "channel"), 64, 64, 6 * (64 * 64 + 64 * 2)),
            (QuantSpec("int3"), 10, 40, 6 * 10 * (15 + 2)),
            (QuantSpec("int2", "channel"), 64, 40, 6 * (64 * 10 + 40 * 4)),
        ],
        ids=lambda value: value.code if isinstance(value, QuantSpec) else str(value),
    )
    def test_shape_and_nbytes(self, spec, kv_len, head_dim, nbytes):
        q = quantize(torch.randn(2, 3, kv_len, head_dim), spec)
        assert q.shape == (2, 3, kv_len, head_dim)
        assert q.nbytes == nbytes
        assert q.data.shape[-1] == spec.row_bytes(head_dim)
        assert q.scale.shape[-1] == spec.num_scales(head_dim)
        assert (q.zero_point is not None) == spec.has_zero_point

    def test_bits_per_element_are_the_bytes(self):
        for spec in SPECS.values():
            q = quantize(torch.randn(1, 2, 128, 128), spec)
            assert q.nbytes * 8 == spec.bits_per_element(128) * q.shape.numel()


class TestQuantSpec:
    @pytest.mark.parametrize(
        ("spec", "head_dim", "bits"),
        [
            (QuantSpec("int8", group_size=128), 128, 8.125),
            (QuantSpec("int8", group_size=64), 128, 8.25),
            (QuantSpec("int8"), 128, 8.125),
            (QuantSpec("int8"), 64, 8.25),
            (QuantSpec("fp8"), 128, 8.125),
            (QuantSpec("int4"), 128, 4.125),
            (QuantSpec("int4", group_size=64), 128, 4.25),
            (QuantSpec("int4", group_size=32), 128, 4.5),
            (QuantSpec("int8", "channel"), 128, 8.5),
            (QuantSpec("int4", "channel"), 128, 4.5),
            (QuantSpec("int8", "channel", block_length=128), 128, 8.25),
            (QuantSpec("int4", "channel", block_length=128), 128, 4.25),
            (QuantSpec("fp8", "channel"), 128, 8.25),
            (QuantSpec("int3"), 128, 3.125),
            (QuantSpec("int2", "channel"), 128, 2.5),
        ],
        ids=lambda value: value.code if isinstance(value, QuantSpec) else str(value),
    )
    def test_bits_per_element(self, spec, head_dim, bits):
        assert spec.bits_per_element(head_dim) == bits

    def test_code_has_an_inverse(self):
        token = itertools.product(FORMATS, ["token"], [None, 16, 32, 64, 128], [None], [False, True])
        channel = itertools.product(FORMATS, ["channel"], [None], [16, 32, 64, 128, 256], [False])
        specs = [QuantSpec(*arguments) for arguments in (*token, *channel)] + [QuantSpec("dense")]
        assert len({spec.code for spec in specs}) == len(specs) == 76
        for spec in specs:
            assert QuantSpec.from_code(spec.code) == spec, spec.code

    def test_codes_are_words(self):
        assert QuantSpec("int8", group_size=64, rotate=True).code == "int8:token:64:rotate"
        assert QuantSpec("int4", "channel").code == "int4:channel:64"
        assert QuantSpec("dense").code == "dense"

    def test_resolve(self):
        assert QuantSpec("int8").resolve(80).group_size == 80
        assert QuantSpec("int8", group_size=16).resolve(80).group_size == 16
        assert QuantSpec("int8", "channel").resolve(80) == QuantSpec("int8", "channel")
        assert QuantSpec("dense").resolve(7) == QuantSpec("dense")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"format": "int5"}, ["format", "'int5'", "int8", "fp8", "int4", "int3", "int2", "dense"]),
            ({"format": 8}, ["format", "8", "int8"]),
            ({"format": None}, ["format", "None", "int8"]),
            ({"format": "int8", "grid": "row"}, ["grid", "'row'", "token", "channel"]),
            ({"format": "int8", "rotate": 1}, ["rotate", "1", "true or false"]),
            ({"format": "int8", "rotate": "yes"}, ["rotate", "'yes'", "true or false"]),
            ({"format": "int8", "group_size": 64.0}, ["group_size", "64.0", "integer"]),
            ({"format": "int8", "group_size": True}, ["group_size", "True", "integer"]),
            ({"format": "int8", "group_size": 0}, ["group_size", "0", "multiple of 8"]),
            ({"format": "int8", "group_size": -16}, ["group_size", "-16", "multiple of 8"]),
            ({"format": "int8", "group_size": 20}, ["group_size", "20", "multiple of 8"]),
            ({"format": "int8", "block_length": 64}, ["block_length", "64", "channel grid"]),
            ({"format": "int8", "grid": "channel", "group_size": 64}, ["group_size", "64", "token grid"]),
            ({"format": "int8", "grid": "channel", "rotate": True}, ["rotate", "True", "false", "channel grid"]),
            (
                {"format": "int8", "grid": "channel", "block_length": 48},
                ["block_length", "48", "16, 32, 64, 128, 256"],
            ),
            ({"format": "int8", "grid": "channel", "block_length": 0}, ["block_length", "0", "16"]),
            ({"format": "int8", "grid": "channel", "block_length": "64"}, ["block_length", "'64'", "integer"]),
            ({"format": "dense", "group_size": 64}, ["group_size", "64", "dense"]),
            ({"format": "dense", "block_length": 64}, ["block_length", "64", "dense"]),
            ({"format": "dense", "grid": "channel"}, ["grid", "'channel'", "dense"]),
            ({"format": "dense", "rotate": True}, ["rotate", "True", "dense"]),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_clear_errors(self, arguments, words):
        with pytest.raises(ValueError) as error:
            QuantSpec(**arguments)
        assert all(word in str(error.value) for word in [*words, "expected"]), str(error.value)

    @pytest.mark.parametrize("head_dim", [0, 4, 12, 100])
    def test_head_dims_that_do_not_fit(self, head_dim):
        with pytest.raises(ValueError, match=f"head_dim: {head_dim} .*expected a multiple of 8"):
            QuantSpec("int8").resolve(head_dim)

    def test_group_size_that_does_not_divide(self):
        with pytest.raises(ValueError, match=r"group_size: 64 does not divide head_dim 96; expected a divisor"):
            quantize(torch.randn(1, 1, 1, 96), QuantSpec("int8", group_size=64))

    def test_dense_is_no_quantized_format(self):
        with pytest.raises(ValueError, match=r"format: 'dense'.*int8"):
            quantize(torch.randn(1, 1, 1, 32), QuantSpec("dense"))
        with pytest.raises(ValueError, match="format: 'dense'"):
            QuantSpec("dense").bits_per_element(64)
