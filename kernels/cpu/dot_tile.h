// What scoring a tile and summing over it have in common.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/codecs.h"
#include "cpu/dot_avx512.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Inlined into one function, GCC runs out of registers for the loops.
#define KVQUANT_NOINLINE __attribute__((noinline))

constexpr int kMaxDotDim = 256;  // so that sums of a group fit 32 bits
constexpr int kMaxGroups = kMaxDotDim / 16;
constexpr int kMaxDotRows = 64 + 3;  // query rows of a call, padded

// Weights that share a factor: number = factor * weight.
struct Share {
  float factor;
  int32_t sum;  // of the weights
};

// Splits n numbers (a multiple of 16) into `Dot::kPasses` rows of quads, which have room for a
// multiple of 64 numbers.
template <class Dot, bool kSum>
inline Share make_weights(const float* x, int n, float factor, int32_t* quads, int stride) {
  const Vec inverse(Dot::inverse(factor));
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < n; c += 64) {
    Vec v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = c + 16 * i < n ? Vec::load(x + c + 16 * i) * inverse : Vec(0.0f);
    }
    sum = _mm512_add_epi32(sum, Dot::split(v, n - c, quads + Dot::quads(c), stride));
  }
  return {factor, kSum ? Dot::total(sum) : 0};
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
  for (int i = 0; i < n; ++i) scale[i] = to_float(Half{from[i * groups]});
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
