// The formats of stored elements, and the conversions that define them, one element at a time.
//
// hf_kvquant/quantization.py is the definition; this file says the same in C++ for every device. A
// row is one token of one head, head_dim elements:
//
//   Signed8    int8, token grid     head_dim bytes, two's complement -127 .. 127
//   Unsigned8  int8, channel grid   head_dim bytes, 0 .. 255
//   E4M3       fp8                  head_dim bytes: sign, 4 exponent bits (bias 7), 3 mantissa bits
//   Nibble     int4                 head_dim / 2 bytes, packed along head_dim in chunks of 32
//                                   channels (the last chunk may be 16): byte j of a chunk of 2h
//                                   channels holds channel j in its low nibble and channel h + j
//                                   in its high nibble
//   ThreeBits  int3                 the same chunks, in two planes: first head_dim / 4 bytes with the
//                                   low bits of all codes, as int2, then head_dim / 8 bytes with the
//                                   high bits: byte j of a chunk of 8h channels holds channels j,
//                                   h + j, .., 7h + j, from its lowest bit to its highest
//   TwoBits    int2                 head_dim / 4 bytes, the same chunks: byte j of a chunk of 4h
//                                   channels holds channels j, h + j, 2h + j, 3h + j, from its lowest
//                                   pair of bits to its highest
//
// Two int4 rows in hex:
//
//   head_dim 32, code of channel c = c % 16
//     00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
//   head_dim 48, code of channel c = c / 4; the second chunk is short
//     40 40 40 40 51 51 51 51 62 62 62 62 73 73 73 73 | a8 a8 a8 a8 b9 b9 b9 b9
#pragma once

#include "kvquant/params.h"

#ifdef __CUDACC__
#define KVQUANT_FN __host__ __device__ inline
#else
#define KVQUANT_FN inline
#endif
#ifndef KVQUANT_ISA
#define KVQUANT_ISA portable
#endif

namespace kvquant {
inline namespace KVQUANT_ISA {

// The 16-bit types of elements that are not quantized; float is the third type.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
static_assert(sizeof(Half) == 2 && sizeof(BFloat16) == 2, "dense elements have 16 bits");

KVQUANT_FN uint32_t bits_of(float x) {
  union {
    float f;
    uint32_t u;
  } v = {x};
  return v.u;
}
KVQUANT_FN float float_of(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } v = {bits};
  return v.f;
}

// NVRTC has no __builtin_inff().
KVQUANT_FN float infinity() { return float_of(0x7f800000u); }
constexpr float kFp16Max = 65504.0f;
constexpr uint16_t kFp16Nan = 0x7e00;

KVQUANT_FN float to_float(float x) { return x; }
KVQUANT_FN float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
KVQUANT_FN float to_float(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  float subnormal = float(int32_t(magnitude)) * 5.9604644775390625e-08f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

// Rounding half to even, subnormals included, as IEEE hardware does.
KVQUANT_FN Half to_half(float x) {
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u) {                             // below 2^-14: a multiple of 2^-24
    uint32_t shifted = bits_of(float_of(magnitude) + 0.5f);  // 0.5 has ulp 2^-24
    return {uint16_t(sign | (shifted - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}
KVQUANT_FN BFloat16 to_bfloat16(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

KVQUANT_FN float e4m3_to_float(uint8_t code) {
  uint32_t exponent = code >> 3 & 15u, mantissa = code & 7u;
  float magnitude = exponent ? float_of((exponent + 120u) << 23 | mantissa << 20)
                             : float(int32_t(mantissa)) * 0.001953125f;  // 2^-9
  return code & 0x80u ? -magnitude : magnitude;
}

// |x| <= 448, rounding half to even.
KVQUANT_FN uint8_t float_to_e4m3(float x) {
  uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x3c800000u) {  // below 2^-6: a multiple of 2^-9, the ulp of 2^14
    return uint8_t(sign | (bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u));
  }
  return uint8_t(sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3)));
}

// Where a row of nibbles holds channels c .. c + 7, for c a multiple of 8, or c .. c + 15 of a
// chunk of 32, for c a multiple of 16. Channel c + i is in byte `byte + i`, in the low nibble
// (shift 0) or the high one (shift 4).
struct NibblePlace {
  int byte, shift;
};
KVQUANT_FN NibblePlace nibble_place(int c, int head_dim) {
  int chunk = c / 32 * 32, half = head_dim - chunk < 32 ? 8 : 16, j = c - chunk;
  return j < half ? NibblePlace{chunk / 2 + j, 0} : NibblePlace{chunk / 2 + j - half, 4};
}
// The channel whose low or high nibble is in byte `byte` of a row.
KVQUANT_FN int nibble_channel(int byte, bool high, int head_dim) {
  int chunk = byte / 16 * 32, half = head_dim - chunk < 32 ? 8 : 16;
  return chunk + byte % 16 + (high ? half : 0);
}

// A format:
//   kReach      where scales are symmetric: the largest magnitude of code - midpoint
//   kLevels     steps from the smallest to the largest code on the channel grid; 0: no zero points
//   kMidpoint   subtracted from every code of the token grid
//   kTokenSpan, kChannelSpan   the share of the elements' range that the codes span
//   Code        how one code is written to a byte
struct WholeRange {
  static constexpr double kTokenSpan = 1.0, kChannelSpan = 1.0;
};
struct Signed8 : WholeRange {
  using Code = Signed8;
  static constexpr float kReach = 127.0f, kLevels = 0.0f, kMidpoint = 0.0f;
  static constexpr bool kIsFloat = false;
};
struct Unsigned8 : WholeRange {
  using Code = Signed8;
  static constexpr float kReach = 255.0f, kLevels = 255.0f, kMidpoint = 0.0f;
  static constexpr bool kIsFloat = false;
};
struct E4M3 : WholeRange {
  using Code = E4M3;
  static constexpr float kReach = 448.0f, kLevels = 0.0f, kMidpoint = 0.0f;
  static constexpr bool kIsFloat = true;
};
struct Nibble : WholeRange {
  using Code = Signed8;
  static constexpr float kReach = 7.5f, kLevels = 15.0f, kMidpoint = 7.5f;
  static constexpr bool kIsFloat = false;
};
struct ThreeBits {
  using Code = Signed8;
  static constexpr float kReach = 3.5f, kLevels = 7.0f, kMidpoint = 3.5f;
  static constexpr double kTokenSpan = 0.9, kChannelSpan = 0.93;
  static constexpr bool kIsFloat = false;
};
struct TwoBits {
  using Code = Signed8;
  static constexpr float kReach = 1.5f, kLevels = 3.0f, kMidpoint = 1.5f;
  static constexpr double kTokenSpan = 0.75, kChannelSpan = 0.85;
  static constexpr bool kIsFloat = false;
};

KVQUANT_FN int dtype_bytes(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }
// Of a code; not of a dense element.
KVQUANT_FN constexpr int code_bits(int64_t format) {
  return format == kInt4 ? 4 : format == kInt3 ? 3 : format == kInt2 ? 2 : 8;
}
KVQUANT_FN int64_t row_bytes(const KvquantSide& side, int64_t dtype) {
  if (side.format == kDense) return side.head_dim * dtype_bytes(dtype);
  return side.head_dim * code_bits(side.format) / 8;
}
KVQUANT_FN int64_t num_scales(const KvquantSide& side) {
  return side.grid == kChannelGrid ? side.head_dim : side.head_dim / side.group_length;
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
