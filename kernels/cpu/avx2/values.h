// Weighted sums over a tile of columns in 16-bit dot products; methods.h draws the loops.
#pragma once

#include "cpu/whole_tile.h"
#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Format>
struct WordValues {
  static constexpr int kPiece = kBytesOf16<Format>;

  // The weights of one query row: probabilities times the scales of a group.
  struct Row {
    alignas(32) int16_t weights[kTile];
    float factor;
    float offset;  // subtracted from every sum
  };

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(values, first, n, rest);
    Row row[kMaxPaddedRows];
    const int group_bytes = int(values.row_bytes / values.num_scales);
    for (int g = 0; g < values.num_scales; ++g) {
      alignas(32) float scale[kTile];
      load_scales(values, g, first, n, scale);
      for (int r = 0; r < rows; ++r) make_row(scale, columns[r], p + r * kTile, row + r);
      for (int byte = g * group_bytes; byte < (g + 1) * group_bytes; byte += kPiece) {
        for_row_blocks<4>(rows, [&](int r, auto block) {
          accumulate_piece<block>(values, data + byte, byte, row + r, acc + r * values.head_dim);
        });
      }
    }
  }

 private:
  KVQUANT_NOINLINE static void make_row(const float* scale, uint64_t columns, const float* p,
                                        Row* row) {
    constexpr int kVecs = kTile / Vec::kWidth;
    Vec w[kVecs];
    Largest largest;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      w[i] = Vec::load(p + i * Vec::kWidth) * Vec::load(scale + i * Vec::kWidth);
      // A hidden column may have no scale yet.
      if (columns != ~uint64_t(0))
        w[i] = Vec::where(uint32_t(columns >> i * Vec::kWidth), w[i], Vec(0.0f));
      largest.take(w[i]);
    }
    row->factor = largest.factor(WeightMaker::largest(kTile));
    WeightMaker maker(row->factor);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; i += 2) maker.make(w[i], w[i + 1], row->weights + 8 * i);
    row->offset = Format::kMidpoint == 0.0f ? 0.0f : Format::kMidpoint * maker.sum();
  }

  // Adds the weighted sums of 16 channels, those of the kPiece bytes from `byte` on in a row, to
  // `acc`. `columns` points at these bytes of the first column.
  template <int kRows>
  KVQUANT_NOINLINE static void accumulate_piece(const Body& values, const uint8_t* columns,
                                                int byte, const Row* row, float* acc) {
    const int64_t row_bytes = values.row_bytes;
    PairSums sums[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r][0].clear();
      sums[r][1].clear();
    }
    for (int i = 0; i < kTile; i += 2, columns += 2 * row_bytes) {
      Words codes[2];
      prefetch_tile(columns + byte / kPiece % 2 * row_bytes, row_bytes);
      load_pairs(Format{}, columns, columns + row_bytes, codes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Words weights = Words::pair(row[r].weights + i);
        sums[r][0].add(codes[0], weights);
        sums[r][1].add(codes[1], weights);
      }
    }
    constexpr bool kNibbles = std::is_same<Format, Nibble>::value;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, acc += values.head_dim) {
      const Vec factor(row[r].factor), offset(row[r].offset);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* out =
            acc + (kNibbles ? nibble_channel(byte, half, values.head_dim) : byte + 8 * half);
        Vec::fma(sums[r][half].to_floats() - offset, factor, Vec::load(out)).store(out);
      }
    }
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
