// Weights x values for values in float32, which have no tile that `ldmatrix` could transpose: lanes
// read them one by one. A product takes 8 columns; its columns t and t + 4 are 2t and 2t + 1 of the
// tile's, because a lane has the weights of these.
//
// Values that are not finite are added one by one, as in non_finite.h.
#pragma once

#include "cuda/layout.h"
#include "cuda/tiles.h"

namespace kvquant {

template <class V, int kTile>
struct FloatValues {
  using Lanes = Layout<kRows>;
  static constexpr int kProducts = kTile / Lanes::kColumns;
  static constexpr int kSums = V::kPairs / Lanes::kPairsOfProduct;
  static constexpr uint32_t kExponent = 0x7f800000u;

  // x: weights, in the order of scores (layout.h); -0 marks that a row does not see a column.
  static KVQUANT_DEVICE void weigh(SharedPtr<uint8_t> tile, const float (&x)[kProducts][4],
                                   float (&acc)[kSums][4]) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t weights[kTile / 8][Lanes::kQueryWords];
    Lanes::float_weights(x, weights);
    bool found = false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float sums[4] = {};
#pragma unroll
      for (int eight = 0; eight < kTile / 8; ++eight) {
        uint32_t values[2 * Lanes::kPairsOfProduct];
#pragma unroll
        for (int j = 0; j < 2 * Lanes::kPairsOfProduct; ++j) {
          const int column = 8 * eight + 2 * t + j / Lanes::kPairsOfProduct,
                    channel = 8 * (i * Lanes::kPairsOfProduct + j % Lanes::kPairsOfProduct) + g;
          const uint32_t bits = shared_cast<uint32_t>(tile + column * kRowStride<V>)[channel];
          const bool finite = (bits & kExponent) != kExponent;
          values[j] = finite ? bits : 0u;
          found |= !finite;
        }
        Lanes::multiply_floats(sums, weights[eight], values);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] += sums[e];
    }
    if (warp_any(found)) add_non_finite(tile, x, acc);
  }

 private:
  static KVQUANT_DEVICE void add_non_finite(SharedPtr<uint8_t> tile, const float (&x)[kProducts][4],
                                            float (&acc)[kSums][4]) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      for (int c = 0; c < Lanes::kColumns; ++c) {
        const int column = m * Lanes::kColumns + c;
        float weight[2];
        bool seen[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int e = Lanes::element_of(r, c);
          const float mine = e == 0 ? x[m][0] : e == 1 ? x[m][1] : e == 2 ? x[m][2] : x[m][3];
          weight[r] = shuffle(mine, Lanes::score_lane(c));
          seen[r] = float_bits(weight[r]) != 0x80000000u;
        }
        const auto row = shared_cast<uint32_t>(tile + column * kRowStride<V>);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = Lanes::row_of(e);
            const uint32_t bits = row[Lanes::column(i, Lanes::column_of(e))];
            if ((bits & kExponent) == kExponent && seen[r])
              acc[i][e] += weight[r] * bits_float(bits);
          }
        }
      }
    }
  }
};

}  // namespace kvquant
