// Dense values that are infinite or NaN. Weight 0 times such a value is NaN, so an MMA would hand
// it to rows that do not see its column. They are replaced by 0 in the operands, and added one by
// one to the rows that see them. Codes are always finite, so for other codecs this does nothing.
#pragma once

#include "cuda/layout.h"
#include "cuda/tiles.h"

namespace kvquant {

template <class V>
struct NonFinite {
  KVQUANT_DEVICE void take_out(typename V::Word&) const {}
  template <int kTile, int kSteps, int kWords, int kSums>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t>, const uint32_t (&)[kSteps][kWords],
                          float (&)[kSums][4]) const {}
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

  // w: the weights; -0 marks that a row does not see a column.
  template <int kTile, int kSteps, int kWords, int kSums>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t> tile, const uint32_t (&w)[kSteps][kWords],
                          float (&acc)[kSums][4]) const {
    using Lanes = Layout<kRows>;
    if (!warp_any(found)) return;
    for (int column = 0; column < kTile; ++column) {
      float weight[2];
      bool seen[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int low = Lanes::weight_word(r, 0), high = Lanes::weight_word(r, 1);
        uint32_t word = column % 16 < 8 ? w[0][low] : w[0][high];
        if constexpr (kSteps > 1) {
          if (column >= 16) word = column % 16 < 8 ? w[1][low] : w[1][high];
        }
        word = shuffle(word, Lanes::weight_lane(r, column)) >> 16 * (column % 2) & 0xffffu;
        weight[r] = to_value(word);
        seen[r] = word != 0x8000u;
      }
      const auto row = shared_cast<uint32_t>(tile + column * kRowStride<V>);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = Lanes::row_of(e), channel = Lanes::column(i, Lanes::column_of(e));
          const uint32_t two = row[channel / 2], bits = two >> 16 * (channel % 2) & 0xffffu;
          if ((bits & kExponent) == kExponent && seen[r]) acc[i][e] += weight[r] * to_value(bits);
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
