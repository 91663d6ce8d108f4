// Scores and weighted sums of a tile of columns in float arithmetic, for every codec.
//
// Query rows are taken four (or two, or one) at a time, so that each element of the cache is
// decoded once for four rows:
//
//   score        W / rows columns x rows       W accumulators of one vector (W: its width)
//                  along head_dim              decode a vector of each column, multiply it with
//                                              every row's query
//                sum_each                      W accumulators -> W scores
//   accumulate   2 or 4 vectors of channels x rows, an accumulator each
//                  along the columns           decode, multiply with every row's weight
#pragma once

#include "cpu/codecs.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Lists the columns whose bits are set, in order; returns how many.
inline int list_columns(uint64_t bits, uint8_t* list) {
  int n = 0;
  for (; bits; bits &= bits - 1) list[n++] = uint8_t(__builtin_ctzll(bits));
  return n;
}

template <int kRows, class Codec>
void score_rows(const Codec& keys, const uint8_t* columns, int n, const float* q, float* scores) {
  constexpr int W = Vec::kWidth, kColumns = W / kRows;
  const int head_dim = keys.head_dim;
  for (int i = 0; i < n; i += kColumns) {
    typename Codec::Row rows[kColumns];
    for (int j = 0; j < kColumns; ++j) rows[j] = keys.row(columns[i + j < n ? i + j : n - 1]);
    Vec acc[W];
    for (Vec& a : acc) a = Vec(0.0f);
    for (int c = 0; c < head_dim; c += W) {
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        Vec k = keys.load(rows[j], c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[j * kRows + r] = Vec::fma(k, Vec::load(q + r * head_dim + c), acc[j * kRows + r]);
        }
      }
    }
    float sums[W];
    Vec::sum_each(acc).store(sums);
    for (int j = 0; j < kColumns && i + j < n; ++j) {
      for (int r = 0; r < kRows; ++r) scores[r * kTile + columns[i + j]] = sums[j * kRows + r];
    }
  }
}

template <int kRows, int kVecs, class Codec>
void accumulate_channels(const Codec& values, const uint8_t* columns, int n, const float* p, int c,
                         float* acc) {
  constexpr int W = Vec::kWidth;
  const int head_dim = values.head_dim;
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVecs; ++j) sum[r][j] = Vec::load(acc + r * head_dim + c + j * W);
  }
  for (int i = 0; i < n; ++i) {
    auto row = values.row(columns[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      Vec v = values.load(row, c + j * W);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        sum[r][j] = Vec::fma(Vec(p[r * kTile + columns[i]]), v, sum[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVecs; ++j) sum[r][j].store(acc + r * head_dim + c + j * W);
  }
}

template <int kRows, class Codec>
void accumulate_rows(const Codec& values, const uint8_t* columns, int n, const float* p,
                     float* acc) {
  constexpr int W = Vec::kWidth, kVecs = W == 16 ? 4 : 2;
  int c = 0;
  for (; c + kVecs * W <= values.head_dim; c += kVecs * W) {
    accumulate_channels<kRows, kVecs>(values, columns, n, p, c, acc);
  }
  for (; c < values.head_dim; c += W) accumulate_channels<kRows, 1>(values, columns, n, p, c, acc);
}

// How many query rows are taken at a time; the rows of a chunk are padded to a multiple of it.
inline int row_block(int rows) { return rows >= 3 ? 4 : rows; }

// scores[r][i] = q[r] . keys[i], for the columns i whose bits are set in `columns`.
template <class Codec>
void score_tile(const Codec& keys, uint64_t columns, const float* q, int rows, float* scores) {
  uint8_t list[kTile];
  const int n = list_columns(columns, list), block = row_block(rows);
  for (int r = 0; r < rows; r += block, q += block * keys.head_dim, scores += block * kTile) {
    if (block == 4) score_rows<4>(keys, list, n, q, scores);
    if (block == 2) score_rows<2>(keys, list, n, q, scores);
    if (block == 1) score_rows<1>(keys, list, n, q, scores);
  }
}

// acc[r] += the sum of p[r][i] * values[i], over the columns i whose bits are set in columns[r].
// Other columns are not read, because a column that a row must not see may hold NaN. Columns that
// every row sees are decoded once for all rows; the others row by row.
template <class Codec>
void accumulate_tile(const Codec& values, const uint64_t* columns, const float* p, int rows,
                     float* acc) {
  uint64_t common = kAllColumns;
  for (int r = 0; r < rows; ++r) common &= columns[r];
  uint8_t list[kTile];
  const int n = list_columns(common, list), block = row_block(rows), head_dim = values.head_dim;
  for (int r = 0; n && r < rows; r += block) {
    const float* weights = p + r * kTile;
    float* sums = acc + r * head_dim;
    if (block == 4) accumulate_rows<4>(values, list, n, weights, sums);
    if (block == 2) accumulate_rows<2>(values, list, n, weights, sums);
    if (block == 1) accumulate_rows<1>(values, list, n, weights, sums);
  }
  for (int r = 0; r < rows; ++r) {
    int own = list_columns(columns[r] & ~common, list);
    if (own) accumulate_rows<1>(values, list, own, p + r * kTile, acc + r * head_dim);
  }
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
