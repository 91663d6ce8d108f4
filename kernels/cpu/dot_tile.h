// Weights of integers and BF16 numbers: what scoring a tile and summing over it have in common.
#pragma once

#include "cpu/dot_avx512.h"
#include "cpu/tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Weights that share a factor: number = factor * weight.
struct Share {
  float factor;
  int32_t sum;  // of the weights
};

// Splits n numbers (a multiple of 16) into `Dot::kPasses` rows of quads, which have room for a
// multiple of 64 numbers.
template <class Dot, bool kSum>
inline Share make_weights(const float* x, int n, float factor, int32_t* quads, int stride) {
  const Vec inverse(Dot::inverse(factor));
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < n; c += 64) {
    Vec v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = c + 16 * i < n ? Vec::load(x + c + 16 * i) * inverse : Vec(0.0f);
    }
    sum = _mm512_add_epi32(sum, Dot::split(v, n - c, quads + Dot::quads(c), stride));
  }
  return {factor, kSum ? Dot::total(sum) : 0};
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
