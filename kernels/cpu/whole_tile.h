// Shared by the loops of dot products, which compute all 64 columns of a tile at once.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/nibbles.h"

// For loops that use nearly all registers: inlined into one function, GCC would spill them. A
// function of its own has the whole of a tile, because calls for a few columns or channels take a
// twentieth of their time.
#define KVQUANT_NOINLINE __attribute__((noinline))

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kMaxDotDim = 512;  // sums over 512 channels fit where they have to; see dot.h
constexpr int kMaxGroups = kMaxDotDim / 16;

// Whether the loops can read these keys or values: on the channel grid a tile must lie in one
// block, and a group of nibbles must be whole chunks.
inline bool takes_tiles(const KvquantSide& side) {
  if (side.head_dim > kMaxDotDim) return false;
  if (side.grid == kChannelGrid) return side.group_length >= kTile;
  return !is_packed(side.format) || side.group_length % 32 == 0 ||
         side.group_length == side.head_dim;
}
// Whether the dot products of weights of 16 bits (dot.h of AVX2 and NEON) can read them. These
// weights are not exact enough for float queries.
inline bool takes_words(const KvquantSide& side, int64_t dtype) {
  return (side.format == kInt8 || is_packed(side.format)) && dtype != kFloat32 && takes_tiles(side);
}

// How many bytes 16 channels take.
template <class Format>
constexpr int kBytesOf16 = 16;
template <>
constexpr int kBytesOf16<Nibble> = 8;

// The rows of 64 columns: where they are stored or, if fewer are left, copied to `rest` and padded
// with zeros.
inline const uint8_t* whole_tile(const Body& body, int64_t first, int n, uint8_t* rest) {
  const uint8_t* rows = body.data + first * body.row_bytes;
  if (n == kTile) return rows;
  std::memcpy(rest, rows, n * body.row_bytes);
  std::memset(rest + n * body.row_bytes, 0, (kTile - n) * body.row_bytes);
  return rest;
}

// The bytes from a column's row to the next one's, and `ahead` of them to the row that is prefetched
// with it.
struct RowStep {
  int64_t bytes, ahead;
  operator int64_t() const { return bytes; }
};
inline RowStep row_step(const Body& body) { return {body.row_bytes, body.ahead}; }

// A tile as the loops of an operand read it, which takes Operand::kBytes bytes for 16 channels.
struct Tile {
  const uint8_t* rows;
  RowStep row_bytes;
};

// The tile whose n columns begin at `first`; `room` is for a tile of kMaxDotDim channels.
template <class Operand>
inline Tile tile_of(Operand, const Body& body, int64_t first, int n, uint8_t* room) {
  return {whole_tile(body, first, n, room), row_step(body)};
}
template <class Operand>
constexpr int kTileRoom = kTile * kMaxDotDim / 16 * Operand::kBytes;

// An operand may sum values on the token grid in passes over chunks of 64 channels, and leave the
// sums in an order of its own until all tiles are added up.
template <class Operand>
constexpr int kPasses = 1;
template <int kRows, int kPass, class Operand, class Row>
inline void sum_words(Operand, const uint8_t* chunks, RowStep row_bytes, const Row* row,
                      Vec (*out)[2]);
template <class Operand>
inline void sort_sums(Operand, float* sums, int head_dim);

// Prefetches n scales that begin `ahead` scales behind these. They are a stream of few bytes per tile,
// which the processor's own prefetcher recognises late.
inline void prefetch_scales(const uint16_t* scales, int64_t n, int64_t ahead) {
  for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(scales + ahead + i, 0, 3);
}

// Token grid: the scales of group g in the n columns from `first` on, and 0 for the others of a tile;
// where they are stored, or copied to `room`.
inline const uint16_t* scales_of(const Body& body, int g, int64_t first, int n, uint16_t* room) {
  const int64_t groups = body.num_scales;
  const uint16_t* from = body.scale + first * groups + g;
  if (g == 0) prefetch_scales(from, kTile * groups, kTilesAhead * kTile * groups);
  if (groups == 1 && n == kTile) return from;
  for (int i = 0; i < n; ++i) room[i] = from[i * groups];
  std::fill(room + n, room + kTile, uint16_t(0));
  return room;
}
inline void load_scales(const Body& body, int g, int64_t first, int n, float* scale) {
  uint16_t room[kTile];
  halves_to_floats(scales_of(body, g, first, n, room), kTile, scale);
}

// Tracks the largest magnitude of the floats passed to `take`.
struct Largest {
  Vec most = Vec(0.0f);

  void take(Vec x) { most = Vec::max_bits(most, Vec::abs(x)); }
  // The factor f for which the largest float is f * weight. NaN if a float is not finite; 0 if all
  // are so small that 1 / f would be infinite.
  float factor(float weight) const {
    const uint32_t largest = Vec::largest_bits(most);
    if (largest >= 0x7f800000u) return __builtin_nanf("");
    return float_of(largest) < 1e-30f ? 0.0f : float_of(largest) * (1.0f / weight);
  }
};

// Keeps floats as weights, with the members of the makers of integers (dot.h). Nothing is added up,
// because fp8 has neither midpoints nor zero points.
struct FloatMaker {
  static float inverse(float) { return 1.0f; }
  void make(Vec a, Vec b, float* weights) {
    a.store(weights);
    b.store(weights + Vec::kWidth);
  }
  float sum() const { return 0.0f; }
};

// Makes the weights of a query row in the order of its channels.
template <class Maker>
struct InOrder : Maker {
  static constexpr int kRoom = 1;                 // weights for a channel, at most
  static constexpr int room(int n) { return n; }  // weights of a group of n channels

  // Makes the weights of a group of n channels; x(c): the floats from channel c on.
  template <class Floats, class Weight>
  void make_group(Floats x, int n, Weight* weights) {
    for (int c = 0; c < n; c += 16) Maker::make(x(c), x(c + 8), weights + c);
  }
};

// Calls f(first row, std::integral_constant<number of rows>) for blocks of at most kMost rows.
template <int kMost, class F>
inline void for_row_blocks(int rows, F f) {
  int r = 0;
  if constexpr (kMost == 8)
    for (; r + 8 <= rows; r += 8) f(r, std::integral_constant<int, 8>());
  if constexpr (kMost >= 4)
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>());
  if constexpr (kMost >= 2)
    for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>());
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
}

// Prefetches what the tile that is kTilesAhead further on has for p. The loops spread these calls
// evenly over a tile: many at once would wait in a queue.
inline void prefetch_tile(const uint8_t* p, RowStep row) {
  __builtin_prefetch(p + row.ahead, 0, 2);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
