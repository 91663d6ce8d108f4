// A row (one token of one head) is spread over the lanes of a warp in octets: each lane holds eight
// consecutive channels, 16 bytes of FP16 or BF16. Rows of up to 64, 128 and 256 channels take 8, 16
// and 32 lanes; where head_dim is less, the last lanes of a row are idle and hold zeros. A row of
// 512 channels takes 32 lanes with two octets each: lane l has octets l and l + 32.
#pragma once

#include "cuda/primitives.h"
#include "kvquant/formats.h"

namespace kvquant {

template <int kHeadDim>
struct Row {
  static_assert(kHeadDim % 16 == 0 && kHeadDim >= 16 && (kHeadDim <= 256 || kHeadDim == 512),
                "head_dim");
  static constexpr int kPerLane = kHeadDim > 256 ? 2 : 1, kOctets = kHeadDim / 8 / kPerLane;
  static constexpr int kLanes = kOctets <= 8 ? 8 : kOctets <= 16 ? 16 : 32;
  static constexpr int kAtOnce = KVQUANT_THREADS / kLanes;  // rows that a block holds

  // Of a lane's octets, number `part`.
  KVQUANT_DEVICE static int octet(int part = 0) { return thread_index() % kLanes + part * kLanes; }
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

// The octets of a lane. Functions take the address of their row.
template <int kDtype, int kHeadDim>
struct Octets {
  using R = Row<kHeadDim>;
  using One = Octet<kDtype>;
  static constexpr int kFloats = 8 * R::kPerLane;
  One parts[R::kPerLane];

  KVQUANT_DEVICE void load(const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) parts[i].load(row + R::octet(i) * One::kBytes);
  }
  KVQUANT_DEVICE void load_once(const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) parts[i].load_once(row + R::octet(i) * One::kBytes);
  }
  KVQUANT_DEVICE void store(uint8_t* row) const {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) parts[i].store(row + R::octet(i) * One::kBytes);
  }
  KVQUANT_DEVICE void unpack(float (&x)[R::kPerLane][8]) const {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) parts[i].unpack(x[i]);
  }
};

// NaN if an element is, so that the maximum also tells whether all are finite.
KVQUANT_DEVICE float largest_magnitude(const float (&x)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max_nan(largest, fabsf(x[i]));
  return largest;
}
template <int kParts>
KVQUANT_DEVICE float largest_magnitude(const float (&x)[kParts][8]) {
  float largest = largest_magnitude(x[0]);
#pragma unroll
  for (int i = 1; i < kParts; ++i) largest = max_nan(largest, largest_magnitude(x[i]));
  return largest;
}
KVQUANT_DEVICE bool is_finite(float magnitude) { return magnitude < bits_float(0x7f800000u); }

KVQUANT_DEVICE void butterfly(float& a, float& b) {
  const float sum = add_rn(a, b);
  b = sub_rn(a, b);
  a = sum;
}

// The normalised Hadamard transform of whole rows, in registers and by shuffles: block-diagonal,
// with blocks of the largest power of two that divides head_dim. Stored bytes depend on its
// rounding, so the order is fixed: butterflies of stride 1, 2, 4, .., then one product.
template <int kHeadDim>
KVQUANT_DEVICE void rotate(float (&x)[Row<kHeadDim>::kPerLane][8]) {
  constexpr int kParts = Row<kHeadDim>::kPerLane;
  constexpr int kBlock = kHeadDim & -kHeadDim;
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) {
      if (i & stride) continue;
      butterfly(x[i / 8][i % 8], x[i / 8][i % 8 + stride]);
    }
  }
#pragma unroll
  for (int mask = 1; mask < 32 && mask < kBlock / 8; mask *= 2) {
    // The second of a pair holds b, which becomes a - b. A product with +-1 is exact.
    const float sign = lane_index() & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) {
      float& y = x[i / 8][i % 8];
      y = fma_rn(y, sign, shuffle_xor(y, mask));
    }
  }
  if constexpr (kBlock == 512) {
#pragma unroll
    for (int i = 0; i < 8; ++i) butterfly(x[0][i], x[1][i]);
  }
  // block ** -0.5, rounded once: a power of two, or sqrt(0.5) times one.
  constexpr double kRoots[] = {0.25,   0.17677669529663687, 0.125, 0.08838834764831845,
                               0.0625, 0.04419417382415922};
  constexpr float kNorm = float(kRoots[kBlock == 16    ? 0
                                       : kBlock == 32  ? 1
                                       : kBlock == 64  ? 2
                                       : kBlock == 128 ? 3
                                       : kBlock == 256 ? 4
                                                       : 5]);
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) x[i / 8][i % 8] = mul_rn(x[i / 8][i % 8], kNorm);
}

// The largest x of a group of kGroup channels of a row, which lies in one octet of each lane, for
// every lane of the group; NaN if one is NaN. Idle lanes hold 0.
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
