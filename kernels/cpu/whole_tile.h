// What all loops over the columns of a whole tile have in common.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/codecs.h"

// Inlined into one function, GCC runs out of registers for the loops.
#define KVQUANT_NOINLINE __attribute__((noinline))

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kMaxDotDim = 256;  // so that sums of a group fit 32 bits
constexpr int kMaxGroups = kMaxDotDim / 16;

// Whether the loops take one side of the cache: a group of nibbles must be whole chunks of 32
// channels, a tile must lie in one block of keys.
inline bool takes_tiles(const KvquantSide& side) {
  if (side.head_dim > kMaxDotDim) return false;
  if (side.grid == kChannelGrid) return side.group_length >= kTile;
  return side.format != kInt4 || side.group_length % 32 == 0 || side.group_length == side.head_dim;
}
// Whether it is for 16-bit dot products (avx2/dot.h), whose weights are not exact enough for float
// queries.
inline bool takes_words(const KvquantSide& side, int64_t dtype) {
  return (side.format == kInt8 || side.format == kInt4) && dtype != kFloat32 && takes_tiles(side);
}

// The rows of 64 columns: where they are stored, or, if fewer are left, a copy in `rest`.
inline const uint8_t* whole_tile(const Body& body, int64_t first, int n, uint8_t* rest) {
  const uint8_t* rows = body.data + first * body.row_bytes;
  if (n == kTile) return rows;
  std::memcpy(rest, rows, n * body.row_bytes);
  std::memset(rest + n * body.row_bytes, 0, (kTile - n) * body.row_bytes);
  return rest;
}

// The token grid's scales of group g, of n columns from `first` on.
inline void load_scales(const Body& body, int g, int64_t first, int n, float* scale) {
  const int64_t groups = body.num_scales;
  const uint16_t* from = body.scale + first * groups + g;
  if (groups == 1) return halves_to_floats(from, n, scale);
  uint16_t column[kTile];
  for (int i = 0; i < n; ++i) column[i] = from[i * groups];
  halves_to_floats(column, n, scale);
}

// The largest magnitude of some numbers.
struct Largest {
  Vec most = Vec(0.0f);

  void take(Vec x) { most = Vec::max_bits(most, Vec::abs(x)); }
  // The factor that makes the largest `weight`: NaN if a number is not finite, 0 if all are so small
  // that its inverse would not be.
  float factor(float weight) const {
    const uint32_t largest = Vec::largest_bits(most);
    if (largest >= 0x7f800000u) return __builtin_nanf("");
    return float_of(largest) < 1e-30f ? 0.0f : float_of(largest) * (1.0f / weight);
  }
};

// kRows queries times the scales of the block of keys whose scales begin at `at`, their largest
// magnitudes, and by lane their products with its zero points. Step by step for all rows, because
// each step waits for the one before it.
template <int kRows>
inline void scale_queries(const Body& keys, int64_t at, const float* q, float (*scaled)[kMaxDotDim],
                          Largest* largest, Vec* zero) {
  const int n = keys.head_dim;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) zero[r] = Vec(0.0f);
  for (int c = 0; c < n; c += Vec::kWidth) {
    const Vec scale = Vec::load((const Half*)(keys.scale + at + c));
    const Vec zero_point =
        keys.zero_point ? Vec::load((const Half*)(keys.zero_point + at + c)) : Vec(0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec v = Vec::load(q + r * n + c), x = v * scale;
      x.store(scaled[r] + c);
      largest[r].take(x);
      zero[r] = Vec::fma(v, zero_point, zero[r]);
    }
  }
}

// Calls f(first row, std::integral_constant<number of rows>) for blocks of at most kMost rows.
template <int kMost, class F>
inline void for_row_blocks(int rows, F f) {
  int r = 0;
  for (; kMost == 4 && r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>());
  for (; kMost >= 2 && r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>());
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
}

// The next tile is fetched while this one is computed, spread evenly: more at once would queue.
inline void prefetch_tile(const uint8_t* p, int64_t row_bytes) {
  __builtin_prefetch(p + kTile * row_bytes, 0, 2);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
