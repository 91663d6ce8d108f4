// The loop over channels of a tile's keys; methods.h draws it.
#pragma once

#include "matrix.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Adds the products of 16 channels of four columns with the weights of each row, which begin at
// channel c.
template <int kRows, class Row>
inline void dot_piece(const int8x16_t* codes, const Row* row, int c, ByteSums (*sums)[4]) {
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const auto* weights = reinterpret_cast<const int8_t*>(row[r].weights + c);
    const int8x16_t low = vld1q_s8(weights), high = vld1q_s8(weights + 16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[r][j].low = vdotq_s32(sums[r][j].low, codes[j], low);
      sums[r][j].high = vdotq_s32(sums[r][j].high, codes[j], high);
    }
  }
}

// totals[r]: the dot products of 8 columns, whose channels begin at `columns`, with the weights of
// query row r from `begin` on.
template <int kRows, class Format, class Row>
inline void dot_columns(DotOperand<Format>, const uint8_t* columns, RowStep row_bytes, int channels,
                        const Row* row, int begin, Vec* totals) {
  using Operand = DotOperand<Format>;
  constexpr bool kNibbles = std::is_same<Format, Nibble>::value;
  int32x4_t four[2][kRows];
#pragma GCC unroll 1
  for (int half = 0; half < 2; ++half, columns += 4 * row_bytes) {
    ByteSums sums[kRows][4];
    for (auto& of_row : sums)
      for (ByteSums& s : of_row) s.clear();
    int c = 0;
    const uint8_t* p = columns;
    for (; c + 16 * (1 + kNibbles) <= channels; c += 16 * (1 + kNibbles), p += 16) {
      uint8x16_t bytes[4];
      int8x16_t codes[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        prefetch_tile(p + j * row_bytes, row_bytes);
        bytes[j] = vld1q_u8(p + j * row_bytes);
        codes[j] = Operand::codes(bytes[j]);
      }
      dot_piece<kRows>(codes, row, begin + c, sums);
      if constexpr (kNibbles) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) codes[j] = Operand::codes(bytes[j], true);
        dot_piece<kRows>(codes, row, begin + c + 16, sums);
      }
    }
    if (c < channels) {  // a chunk of 16 channels: eight low nibbles, then eight high ones
      int8x16_t codes[4];
      for (int j = 0; j < 4; ++j) {
        const uint8x8_t bytes = vld1_u8(p + j * row_bytes);
        codes[j] =
            vreinterpretq_s8_u8(vcombine_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4)));
      }
      dot_piece<kRows>(codes, row, begin + c, sums);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const ByteSums* s = sums[r];
      four[half][r] = vpaddq_s32(vpaddq_s32(s[0].whole(), s[1].whole()),
                                 vpaddq_s32(s[2].whole(), s[3].whole()));
    }
  }
  for (int r = 0; r < kRows; ++r) totals[r] = floats_of(four[0][r], four[1][r]);
}

// The same for floats: passes of 8 / kRows columns.
template <int kRows, class Row>
inline void dot_columns(E4M3Operand, const uint8_t* columns, RowStep row_bytes, int channels,
                        const Row* row, int begin, Vec* totals) {
  constexpr int kColumns = 8 / kRows;
  alignas(16) float scores[8 * kRows];  // `[columns, rows]`
#pragma GCC unroll 1
  for (int pass = 0; pass < kRows; ++pass, columns += kColumns * row_bytes) {
    Vec sums[8];
    for (Vec& s : sums) s = Vec(0.0f);
    for (int c = 0; c < channels; c += Vec::kWidth) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        prefetch_tile(columns + j * row_bytes + c, row_bytes);
        const Vec codes = E4M3Operand::load(columns + j * row_bytes + c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec weights = Vec::load(row[r].weights + begin + c);
          sums[j * kRows + r] = Vec::fma(codes, weights, sums[j * kRows + r]);
        }
      }
    }
    Vec::sum_each(sums).store(scores + 8 * pass);
  }
  for (int half = 0; half < 2; ++half) {
    const float* of_four = scores + 4 * kRows * half;
    const auto set = [&](int r, float32x4_t x) { (half ? totals[r].high : totals[r].low) = x; };
    if constexpr (kRows == 1) set(0, vld1q_f32(of_four));
    if constexpr (kRows == 2) {
      const float32x4x2_t x = vld2q_f32(of_four);
      for (int r = 0; r < 2; ++r) set(r, x.val[r]);
    }
    if constexpr (kRows == 4) {
      const float32x4x4_t x = vld4q_f32(of_four);
      for (int r = 0; r < 4; ++r) set(r, x.val[r]);
    }
  }
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
