// A row of kDim floats in the registers of a warp: x[r][i] of lane l is channel 128 r + 4 l + i.
// `rotate` is the normalised Hadamard transform, its own inverse, block-diagonal with blocks of the
// largest power of two that divides kDim.
#pragma once

#include "cuda/specialisation.h"

namespace kvquant {

template <int kDim>
struct WarpRow {
  static constexpr int kRounds = (kDim + 127) / 128, kBlock = kDim & -kDim;
  float x[kRounds][4];

  static KVQUANT_DEVICE int channel(int r) { return 128 * r + 4 * lane_index(); }

  // Butterflies of stride 1, 2, 4, .. and one product at the end, in this order.
  KVQUANT_DEVICE void rotate() {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      butterfly(x[r][0], x[r][1]);
      butterfly(x[r][2], x[r][3]);
      butterfly(x[r][0], x[r][2]);
      butterfly(x[r][1], x[r][3]);
    }
#pragma unroll
    for (int lanes = 1; lanes < 32 && 4 * lanes < kBlock; lanes *= 2) {
      const bool upper = lane_index() & lanes;
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float other = shuffle_xor(x[r][i], lanes);
          x[r][i] = upper ? sub_rn(other, x[r][i]) : add_rn(x[r][i], other);
        }
      }
    }
#pragma unroll
    for (int rounds = 1; 128 * rounds < kBlock; rounds *= 2) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (r & rounds) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) butterfly(x[r][i], x[r + rounds][i]);
      }
    }
    constexpr float kNorm = inverse_root(kBlock);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[r][i] = mul_rn(x[r][i], kNorm);
    }
  }

 private:
  static KVQUANT_DEVICE void butterfly(float& a, float& b) {
    const float sum = add_rn(a, b);
    b = sub_rn(a, b);
    a = sum;
  }
  static KVQUANT_FN constexpr float inverse_root(int block) {
    float square = 1.0f;  // 1 / sqrt of the largest power of four in `block`
    int n = block;
    for (; n >= 4; n /= 4) square *= 0.5f;
    return n == 2 ? square * 0.70710678118654752440f : square;
  }
};

KVQUANT_DEVICE float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}
KVQUANT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

}  // namespace kvquant
