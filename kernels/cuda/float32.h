// Products of float32 numbers by tensor cores, which take numbers of 11 bits. A number is the sum
// of two terms, of which the second one is what the first one leaves:
//
//   x codes      FP16 terms: codes are exact in FP16, so two products are enough
//   x float32    TF32 terms (the upper 19 bits of a float32): three products; the fourth, of both
//                second terms, is less than 2^-20 of the whole
//
// Sums are float32, as those of other dtypes.
#pragma once

#include "cuda/primitives.h"

namespace kvquant {

// What the second FP16 term of a query is multiplied by, so that it is as exact as the first one
// where that is small.
constexpr float kSecondTerm = 0x1p11f;

// The terms of two neighbouring elements, the second ones multiplied by `up`.
KVQUANT_DEVICE void split_halves(float x, float y, float up, uint32_t& first, uint32_t& second) {
  first = pack_half2(x, y);
  second = pack_half2((x - half_low(first)) * up, (y - half_high(first)) * up);
}

constexpr uint32_t kTf32Bits = 0xffffe000u;

// Infinity becomes NaN: it leaves no number.
KVQUANT_DEVICE void split_tf32(uint32_t x, uint32_t& first, uint32_t& second) {
  first = x & kTf32Bits;
  second = float_bits(bits_float(x) - bits_float(first)) & kTf32Bits;
}

// c += a b, a `[16, 8]`, b `[8, 8]` and c `[16, 8]` in float32, laid out as mma_m16n8k8_tf32 says.
KVQUANT_DEVICE void multiply_float32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  uint32_t a_terms[2][4], b_terms[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32(a[i], a_terms[0][i], a_terms[1][i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split_tf32(b[i], b_terms[0][i], b_terms[1][i]);
  mma_m16n8k8_tf32(c, a_terms[1], b_terms[0]);
  mma_m16n8k8_tf32(c, a_terms[0], b_terms[1]);
  mma_m16n8k8_tf32(c, a_terms[0], b_terms[0]);
}

// The transpose of an 8x8 matrix of floats: a lane gives row g, columns 2t and 2t + 1, and gets the
// same of the result.
KVQUANT_DEVICE void transpose_8x8_floats(float x, float y, uint32_t (&to)[2]) {
  const uint32_t low = transpose_8x8(prmt(float_bits(x), float_bits(y), 0x5410)),
                 high = transpose_8x8(prmt(float_bits(x), float_bits(y), 0x7632));
  to[0] = prmt(low, high, 0x5410);
  to[1] = prmt(low, high, 0x7632);
}

}  // namespace kvquant
