// The loop over channels of a tile's keys; methods.h draws it.
#pragma once

#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// n vectors of channels, from c on in a query row, of the columns of one pass of dot_columns.
template <class Operand, int kRows, int n, class Row>
inline void dot_piece(const uint8_t* columns, int64_t row_bytes, const Row* row, int c,
                      typename Operand::Sums* sums) {
  using Vector = typename Operand::Vector;
  constexpr int kOfLane = 4 / kRows;
  const auto column = [&](int j) { return columns + (j % kOfLane + j / kOfLane * 4) * row_bytes; };
#pragma GCC unroll 4
  for (int j = 0; j < 2 * kOfLane; j += 2) {
    Vector a[n], b[n];
    prefetch_tile(column(j), row_bytes);
    prefetch_tile(column(j + 1), row_bytes);
    Operand::template load<n>(column(j), a);
    Operand::template load<n>(column(j + 1), b);
#pragma GCC unroll 2
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vector weights = Vector::load(row[r].weights + c + Vector::kWidth * i);
        sums[j * kRows + r].add(a[i], weights);
        sums[(j + 1) * kRows + r].add(b[i], weights);
      }
    }
  }
}

// totals[r]: the dot products of 8 columns, whose channels begin at `columns`, with the weights of
// query row r from `begin` on.
template <int kRows, class Operand, class Row>
inline void dot_columns(Operand, const uint8_t* columns, int64_t row_bytes, int channels,
                        const Row* row, int begin, Vec* totals) {
  // A pass computes kOfLane columns, from kOfLane * pass on, for the lower lane of its totals, and
  // the columns 4 further on for the upper lane.
  constexpr int kOfLane = 4 / kRows, kWidth = Operand::Vector::kWidth;
#pragma GCC unroll 1
  for (int pass = 0; pass < kRows; ++pass, columns += kOfLane * row_bytes) {
    typename Operand::Sums sums[8];
#pragma GCC unroll 8
    for (auto& s : sums) s.clear();
    int c = 0, byte = 0;
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth, byte += kWidth / 8 * Operand::kBytes)
      dot_piece<Operand, kRows, 2>(columns + byte, row_bytes, row, begin + c, sums);
    if constexpr (kWidth == 16) {
      if (c < channels)
        dot_piece<Operand, kRows, 1>(columns + byte, row_bytes, row, begin + c, sums);
    }
    totals[pass] = Operand::Sums::totals(sums);
  }
  transpose<kRows>(totals);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
