// Dense values that are infinite or NaN. Weight 0 times such a value is NaN, so an MMA would hand
// it to rows that do not see its column. They are replaced by 0 in the operands, and added one by
// one to the rows that see them. Codes are always finite, so for other codecs this does nothing.
#pragma once

#include "cuda/tiles.h"

namespace kvquant {

template <class V>
struct NonFinite {
  KVQUANT_DEVICE void take_out(uint32_t&) const {}
  template <int kTile, int kSteps>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t>, const uint32_t (&)[kSteps][4],
                          float (&)[V::kPairs][4]) const {}
};

template <int kDim, bool kBFloat16>
struct NonFinite<Dense16<kDim, kBFloat16>> {
  using V = Dense16<kDim, kBFloat16>;
  static constexpr uint32_t kExponent = kBFloat16 ? 0x7f80u : 0x7c00u;
  bool found = false;

  KVQUANT_DEVICE void take_out(uint32_t& word) {
    if ((word & kExponent) == kExponent) {
      word &= 0xffff0000u;
      found = true;
    }
    if ((word >> 16 & kExponent) == kExponent) {
      word &= 0x0000ffffu;
      found = true;
    }
  }

  // a: the weights; -0 marks that a row does not see a column.
  template <int kTile, int kSteps>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t> tile, const uint32_t (&a)[kSteps][4],
                          float (&acc)[V::kPairs][4]) const {
    if (!warp_any(found)) return;
    const int lane = lane_index();
    for (int column = 0; column < kTile; ++column) {
      float weight[2];
      bool seen[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t word = column % 16 < 8 ? a[0][r] : a[0][r + 2];
        if constexpr (kSteps > 1) {
          if (column >= 16) word = column % 16 < 8 ? a[1][r] : a[1][r + 2];
        }
        word = shuffle(word, lane / 4 * 4 + column % 8 / 2) >> 16 * (column % 2) & 0xffffu;
        weight[r] = to_value(word);
        seen[r] = word != 0x8000u;
      }
      const auto row = shared_cast<uint32_t>(tile + column * kRowStride<V>);
#pragma unroll
      for (int pair = 0; pair < V::kPairs; ++pair) {
        const uint32_t two = row[4 * pair + lane % 4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t bits = two >> 16 * (e % 2) & 0xffffu;
          if ((bits & kExponent) == kExponent && seen[e / 2]) {
            acc[pair][e] += weight[e / 2] * to_value(bits);
          }
        }
      }
    }
  }

 private:
  static KVQUANT_DEVICE float to_value(uint32_t bits) {
    return kBFloat16 ? bfloat16_low(bits) : half_low(bits);
  }
};

}  // namespace kvquant
