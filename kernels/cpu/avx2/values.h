// The loop over the columns of a tile's values; methods.h draws it.
#pragma once

#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// sums[r][i]: the sum over a tile's columns of the weights of row r times eight channels. They are
// the channels of 16 bytes in order, or the low nibbles and then the high nibbles of 8 bytes.
// `columns` points at these bytes of the first column, which are those from `byte` on in a row.
template <int kRows, class Operand, class Row>
inline void sum_columns(Operand, const uint8_t* columns, int64_t row_bytes, int byte,
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

}  // namespace KVQUANT_ISA
}  // namespace kvquant
