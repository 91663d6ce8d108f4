// The loop over the columns of a tile's values; methods.h draws it.
#pragma once

#include "matrix.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Adds the products of four columns, which are group kGroup of 16, to the sums of eight channels.
// codes[i]: the columns' codes of channels 4 i .. 4 i + 3, those of a channel side by side.
template <int kGroup, int kRows>
inline void sum_piece(const int8x16_t* codes, const int8x16_t (*weights)[2], ByteSums (*sums)[2]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      sums[r][i].low = vdotq_laneq_s32(sums[r][i].low, codes[i], weights[r][0], kGroup);
      sums[r][i].high = vdotq_laneq_s32(sums[r][i].high, codes[i], weights[r][1], kGroup);
    }
  }
}

// The codes of the eight channels whose bytes begin at p, of four columns; of bytes of two nibbles,
// the low or the high ones.
template <class Operand, bool kHigh>
inline void load_four(const uint8_t* p, int64_t row_bytes, int8x16_t* codes) {
  const uint8x8_t a = vld1_u8(p), b = vld1_u8(p + row_bytes);
  const uint8x8_t c = vld1_u8(p + 2 * row_bytes), d = vld1_u8(p + 3 * row_bytes);
  const uint8x16_t ac = vcombine_u8(vzip1_u8(a, c), vzip2_u8(a, c));
  const uint8x16_t bd = vcombine_u8(vzip1_u8(b, d), vzip2_u8(b, d));
  codes[0] = Operand::codes(vzip1q_u8(ac, bd), kHigh);
  codes[1] = Operand::codes(vzip2q_u8(ac, bd), kHigh);
}

// out[r]: the sum over a tile's columns of the weights of row r times eight channels. One of every
// four columns is prefetched, number `prefetched`.
template <int kRows, bool kHigh, class Format, class Row>
inline void sum_half(DotOperand<Format>, const uint8_t* columns, RowStep row_bytes, int prefetched,
                     const Row* row, Vec* out) {
  using Operand = DotOperand<Format>;
  ByteSums sums[kRows][2];
  for (auto& of_row : sums)
    for (ByteSums& s : of_row) s.clear();
#pragma GCC unroll 1
  for (int i = 0; i < kTile; i += 16) {
    int8x16_t weights[kRows][2], codes[2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto* bytes = reinterpret_cast<const int8_t*>(row[r].weights + i);
      weights[r][0] = vld1q_s8(bytes);
      weights[r][1] = vld1q_s8(bytes + 16);
    }
    const auto four = [&](auto group) {
      if (!kHigh) prefetch_tile(columns + prefetched * row_bytes, row_bytes);
      load_four<Operand, kHigh>(columns, row_bytes, codes);
      sum_piece<group, kRows>(codes, weights, sums);
      columns += 4 * row_bytes;
    };
    four(std::integral_constant<int, 0>());
    four(std::integral_constant<int, 1>());
    four(std::integral_constant<int, 2>());
    four(std::integral_constant<int, 3>());
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) out[r] = floats_of(sums[r][0].whole(), sums[r][1].whole());
}

// sums[r][i]: the sums of 16 channels: those of 16 bytes in order, or the low nibbles and then the
// high nibbles of 8 bytes. `columns` points at these bytes of the first column, which are those from
// `byte` on in a row.
template <int kRows, class Operand, class Row>
inline void sum_columns(Operand operand, const uint8_t* columns, RowStep row_bytes, int byte,
                        const Row* row, Vec (*out)[2]) {
  constexpr int kBytes = kBytesOf16<typename Operand::Format>;
  Vec half[2][kRows];
  const int prefetched = byte / kBytes % 4;
  sum_half<kRows, false>(operand, columns, row_bytes, prefetched, row, half[0]);
  sum_half<kRows, true>(operand, columns + kBytes - 8, row_bytes, prefetched, row, half[1]);
  for (int r = 0; r < kRows; ++r) {
    out[r][0] = half[0][r];
    out[r][1] = half[1][r];
  }
}

// The same for floats.
template <int kRows, class Row>
inline void sum_columns(E4M3Operand, const uint8_t* columns, RowStep row_bytes, int, const Row* row,
                        Vec (*out)[2]) {
  Vec sums[kRows][2];
  for (auto& of_row : sums) of_row[0] = of_row[1] = Vec(0.0f);
#pragma GCC unroll 1
  for (int i = 0; i < kTile; ++i, columns += row_bytes) {
    prefetch_tile(columns, row_bytes);
    const Vec codes[2] = {E4M3Operand::load(columns), E4M3Operand::load(columns + 8)};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight(row[r].weights[i]);
      sums[r][0] = Vec::fma(codes[0], weight, sums[r][0]);
      sums[r][1] = Vec::fma(codes[1], weight, sums[r][1]);
    }
  }
  std::memcpy(out, sums, sizeof(sums));
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
