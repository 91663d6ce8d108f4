// The loop over the columns of a tile's values; methods.h draws it.
#pragma once

#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// sums[r][i]: the sum over a tile's columns of the weights of row r times eight channels. They are
// the channels of 16 bytes in order, or the low nibbles and then the high nibbles of 8 bytes.
// `columns` points at these bytes of the first column, which are those from `byte` on in a row.
template <int kRows, class Operand, class Row>
inline void sum_columns(Operand, const uint8_t* columns, RowStep row_bytes, int byte,
                        const Row* row, Vec (*out)[2]) {
  using Vector = typename Operand::Vector;
  constexpr int kColumns = Operand::kColumns;
  typename Operand::Sums sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r][0].clear();
    sums[r][1].clear();
  }
  for (int i = 0; i < kTile; i += kColumns, columns += kColumns * row_bytes) {
    Vector codes[2];
    if (Operand::kBytes < 32)  // not of fp8, which are in a room of their own
      prefetch_tile(columns + byte / Operand::kBytes % kColumns * row_bytes, row_bytes);
    Operand::load_columns(columns, row_bytes, codes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector weights = Operand::broadcast(row[r].weights + i);
      sums[r][0].add(codes[0], weights);
      sums[r][1].add(codes[1], weights);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    out[r][0] = sums[r][0].to_floats();
    out[r][1] = sums[r][1].to_floats();
  }
}

// Nibbles of whole chunks of 64 channels, 32 bytes of a row. A pass pairs words of two columns, of
// the lower (passes 0 and 1) or the upper eight bytes of each lane, and multiplies
//
//   the low nibbles of the words' low bytes (passes 0 and 2) or high bytes, and
//   these bytes, low nibble + 16 high nibble,
//
// so that the difference of both sums is 16 times that of the high nibbles. This takes an instruction
// less than `sum_columns`, but keeps the sums of even and odd bytes apart; `sort_sums` puts them in
// order.
template <>
constexpr int kPasses<IntOperand<Nibble>> = 4;

template <int kRows, int kPass, class Row>
inline void sum_words(IntOperand<Nibble>, const uint8_t* chunks, RowStep row_bytes, const Row* row,
                      Vec (*out)[2]) {
  PairSums low[kRows], whole[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    low[r].clear();
    whole[r].clear();
  }
  for (int i = 0; i < kTile; i += 2, chunks += 2 * row_bytes) {
    prefetch_tile(chunks + kPass % 2 * row_bytes, row_bytes);
    const __m256i a = _mm256_loadu_si256((const __m256i*)chunks);
    const __m256i b = _mm256_loadu_si256((const __m256i*)(chunks + row_bytes));
    const Words bytes = codes_of<kPass % 2>(
        Unsigned8{}, kPass / 2 ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b));
    const Words nibbles = bytes.low_nibbles();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Words weights = Words::pair(row[r].weights + i);
      low[r].add(nibbles, weights);
      whole[r].add(bytes, weights);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const PairSums high{_mm256_sub_epi32(whole[r].v, low[r].v)};
    out[r][0] = low[r].to_floats();
    out[r][1] = high.to_floats() * Vec(1.0f / 16.0f);
  }
}

// Each pass has the sums of low and of high nibbles. Vector 4 * upper + 2 * odd + high of a chunk has
// the channels 8 * upper + odd + 16 * high + {0, 2, 4, 6, 32, 34, 36, 38}.
inline void sort_sums(IntOperand<Nibble>, float* sums, int head_dim) {
  for (int c = 0; c < head_dim; c += 64, sums += 64) {
    Vec sorted[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int upper = i / 2, high = i % 2;
      const float* from = sums + 8 * (4 * upper + high);
      const __m256 even = Vec::load(from).v, odd = Vec::load(from + 16).v;
      const __m256 x = _mm256_unpacklo_ps(even, odd), y = _mm256_unpackhi_ps(even, odd);
      sorted[2 * high + upper] = _mm256_permute2f128_ps(x, y, 0x20);
      sorted[4 + 2 * high + upper] = _mm256_permute2f128_ps(x, y, 0x31);
    }
    for (int i = 0; i < 8; ++i) sorted[i].store(sums + 8 * i);
  }
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
