// A row (one token of one head) is spread over the lanes of a warp in octets: each lane holds eight
// consecutive channels, 16 bytes of FP16 or BF16. Rows of up to 64, 128 and 256 channels take 8, 16
// and 32 lanes; where head_dim is less, the last lanes of a row are idle and hold zeros.
#pragma once

#include "cuda/primitives.h"
#include "kvquant/formats.h"

namespace kvquant {

template <int kHeadDim>
struct Row {
  static_assert(kHeadDim % 16 == 0 && kHeadDim >= 16 && kHeadDim <= 256, "head_dim");
  static constexpr int kOctets = kHeadDim / 8;
  static constexpr int kLanes = kOctets <= 8 ? 8 : kOctets <= 16 ? 16 : 32;
  static constexpr int kAtOnce = KVQUANT_THREADS / kLanes;  // rows that a block holds

  KVQUANT_DEVICE static int octet() { return thread_index() % kLanes; }
  KVQUANT_DEVICE static int index() { return thread_index() / kLanes; }  // below kAtOnce
  KVQUANT_DEVICE static bool idle() { return octet() >= kOctets; }
};

// Eight elements of a KvquantDtype, as stored.
template <int kDtype>
struct Octet {
  static constexpr int kWords = kDtype == kFloat32 ? 2 : 1;
  static constexpr int kBytes = 16 * kWords;
  Words4 words[kWords] = {};

  KVQUANT_DEVICE void load(const uint8_t* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_16(p + 16 * i);
  }
  KVQUANT_DEVICE void load_once(const uint8_t* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_16_once(p + 16 * i);
  }
  KVQUANT_DEVICE void store(uint8_t* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_16(p + 16 * i, words[i]);
  }

  KVQUANT_DEVICE void unpack(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kDtype == kFloat32) {
          x[4 * i + j] = bits_float(w[j]);
        } else {
          x[2 * j] = kDtype == kFloat16 ? half_low(w[j]) : bfloat16_low(w[j]);
          x[2 * j + 1] = kDtype == kFloat16 ? half_high(w[j]) : bfloat16_high(w[j]);
        }
      }
    }
  }
};

// NaN if an element is, so that the maximum also tells whether all are finite.
KVQUANT_DEVICE float largest_magnitude(const float (&x)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max_nan(largest, fabsf(x[i]));
  return largest;
}
KVQUANT_DEVICE bool is_finite(float magnitude) { return magnitude < bits_float(0x7f800000u); }

// The normalised Hadamard transform of whole rows, in registers and by shuffles: block-diagonal,
// with blocks of the largest power of two that divides head_dim. Stored bytes depend on its
// rounding, so the order is fixed: butterflies of stride 1, 2, 4, .., then one product.
template <int kHeadDim>
KVQUANT_DEVICE void rotate(float (&x)[8]) {
  constexpr int kBlock = kHeadDim & -kHeadDim;
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = add_rn(a, b);
      x[i + stride] = sub_rn(a, b);
    }
  }
#pragma unroll
  for (int mask = 1; mask < kBlock / 8; mask *= 2) {
    // The second of a pair holds b, which becomes a - b. A product with +-1 is exact.
    const float sign = lane_index() & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = fma_rn(x[i], sign, shuffle_xor(x[i], mask));
  }
  // block ** -0.5, rounded once: a power of two, or sqrt(0.5) times one.
  constexpr double kRoots[] = {0.25, 0.17677669529663687, 0.125, 0.08838834764831845, 0.0625};
  constexpr float kNorm = float(kRoots[kBlock == 16    ? 0
                                       : kBlock == 32  ? 1
                                       : kBlock == 64  ? 2
                                       : kBlock == 128 ? 3
                                                       : 4]);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = mul_rn(x[i], kNorm);
}

// The largest x of a group of kGroup channels of a row, for every lane of the group; NaN if one is
// NaN. Idle lanes hold 0.
template <int kHeadDim, int kGroup>
KVQUANT_DEVICE float group_max(float x) {
  constexpr int kLanes = Row<kHeadDim>::kLanes, kOctets = kGroup / 8;
  if constexpr (kGroup == kHeadDim || (kOctets & (kOctets - 1)) == 0) {
#pragma unroll
    for (int mask = 1; mask < (kGroup == kHeadDim ? kLanes : kOctets); mask *= 2) {
      x = max_nan(x, shuffle_xor(x, mask));
    }
    return x;
  } else {
    const int lane = lane_index(), first = lane - lane % kLanes % kOctets;
    float largest = 0.0f;
    for (int i = 0; i < kOctets; ++i) {
      largest = max_nan(largest, shuffle(x, (first + i) % 32));  // beyond 31: an idle lane
    }
    return largest;
  }
}

}  // namespace kvquant
