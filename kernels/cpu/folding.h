// Keys on the channel grid: the scales of a block are folded into the query, so that what is left of a
// score is a dot product of codes.
//
//   q . k = sum of (q[c] scale[c]) code[c] + sum of q[c] zero_point[c]
//
// The products q[c] scale[c] become weights with a common factor (dot.h). Up to kRangeBlocks blocks
// share the factor, so each product is rounded to a weight as it is made: to find the largest product
// of every block first would take twice as long. The error of a weight is relative to the largest
// product of the range. Ranges begin at multiples of kRangeBlocks, and depend on nothing but the row's
// length.
#pragma once

#include "cpu/whole_tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// A query divided by the factor of a range.
struct alignas(64) DividedQuery {
  float q[kMaxDotDim];
  float factor;
};

// What `Keys` prepares for keys on the channel grid: a range, then its queries, then a row of weights
// for each query. `Keys` has
//   Row                           the weights of a query in one block
//   kRounds                       whether weights are integers; if not, queries are not divided
//   factor(largest, head_dim)     the factor of weights up to the largest product
//   fold(keys, block, query, row) makes the weights of kRows rows
template <class Keys>
struct Folding {
  using Row = typename Keys::Row;
  // The blocks whose factor divided the queries.
  struct alignas(64) Divided {
    int64_t begin, end;
  };

  static size_t prepared_bytes(int rows) {
    return sizeof(Divided) + rows * (sizeof(DividedQuery) + sizeof(Row));
  }
  static void prepare(void* prepared) { *static_cast<Divided*>(prepared) = {0, 0}; }

  // The weights of all rows for the block of column `first`.
  KVQUANT_NOINLINE static const Row* fold(const Body& keys, int64_t first, const float* q, int rows,
                                          void* prepared) {
    Divided& divided = *static_cast<Divided*>(prepared);
    auto* query = reinterpret_cast<DividedQuery*>(&divided + 1);
    auto* row = reinterpret_cast<Row*>(query + rows);
    const int64_t block = first / keys.group_length;
    if (block < divided.begin || block >= divided.end) {
      const BlockRange& range = *keys.range;
      divided = {range.begin, range.end};
      // If one block of them has a scale that is not finite, every block is left to itself.
      if (!divide(keys, range.scale, int(range.end - range.begin), q, rows, query)) {
        divided = {block, block + 1};
        divide(keys, range.scale + (block - range.begin), 1, q, rows, query);
      }
    }
    const int n = keys.head_dim;
    // A range is read as a whole, then once more, block by block.
    prefetch_scales(keys.scale + block * n, n, (Keys::kRounds ? kRangeBlocks : kTilesAhead) * n);
    if (keys.zero_point) prefetch_scales(keys.zero_point + block * n, n, kTilesAhead * n);
    for_row_blocks<4>(
        rows, [&](int r, auto n) { Keys::template fold<n>(keys, block, query + r, row + r); });
    return row;
  }

 private:
  // Divides the queries by the factors of `count` blocks. Returns false if a product is not finite.
  static bool divide(const Body& keys, const uint16_t* const* scale, int count, const float* q,
                     int rows, DividedQuery* query) {
    const int n = keys.head_dim;
    alignas(64) float most[kMaxDotDim];  // the largest scale of each channel
    for (int c = 0; Keys::kRounds && c < n; c += Vec::kWidth) {
      Vec x = Vec::load((const Half*)scale[0] + c);
      for (int b = 1; b < count; ++b) x = Vec::max_bits(x, Vec::load((const Half*)scale[b] + c));
      x.store(most + c);
    }
    bool finite = true;
    for (int r = 0; r < rows; ++r, q += n) {
      Largest largest;
      for (int c = 0; Keys::kRounds && c < n; c += Vec::kWidth)
        largest.take(Vec::load(q + c) * Vec::load(most + c));
      const float factor = Keys::factor(largest, n);
      finite &= factor == factor;
      // Weights of products that are next to nothing are 0; the zero points still count.
      query[r].factor = factor < 1e-20f ? 1.0f : factor;
      const float inverse = Keys::kRounds ? 1.0f / query[r].factor : 1.0f;
      for (int c = 0; c < n; c += Vec::kWidth)
        (Vec::load(q + c) * Vec(inverse)).store(query[r].q + c);
    }
    return finite;
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
