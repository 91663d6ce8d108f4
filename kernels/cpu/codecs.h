// Codecs: how the elements of a tile are read as floats, whatever their format.
//
// A codec is made for one tile of one head. `row(i)` finds column i, `load(row, c)` decodes
// Vec::kWidth channels of it from c on. The loops of float_tile.h are written once, for every
// codec.
#pragma once

#include <algorithm>

#include "kvquant/formats.h"
#include "vec.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kTile = 64;                       // columns
constexpr uint64_t kAllColumns = ~uint64_t(0);  // of a tile
constexpr int kTilesAhead = 2;                  // how far ahead tiles are prefetched
constexpr int kMaxRows = 64;                    // query rows of a chunk
constexpr int kMaxPaddedRows = kMaxRows + 3;
constexpr int kMaxHeadDim = 512;

// The stored rows of one head, keys or values.
struct Body {
  const uint8_t* data;
  const uint16_t *scale, *zero_point;
  int64_t format, row_bytes, num_scales, group_length;
  int64_t ahead;  // bytes from a row of a tile to the same row of the tile kTilesAhead further on
  const struct BlockRange* range;  // keys on the channel grid: the blocks around a tile (folding.h)
  int head_dim;
  float midpoint;  // subtracted from every code
  bool rotated, channel_grid;
};

inline Body body_of(const KvquantSide& side, int64_t dtype, int64_t b, int64_t h) {
  Body body{};
  body.data = side.data + b * side.data_stride[0] + h * side.data_stride[1];
  body.format = side.format;
  body.row_bytes = row_bytes(side, dtype);
  body.ahead = kTilesAhead * kTile * body.row_bytes;
  body.head_dim = int(side.head_dim);
  if (side.format == kDense) return body;
  int64_t offset = (b * side.scale_stride[0] + h * side.scale_stride[1]) / 2;
  body.scale = side.scale + offset;
  body.zero_point = side.zero_point ? side.zero_point + offset : nullptr;
  body.num_scales = num_scales(side);
  body.group_length = side.group_length;
  body.rotated = side.rotate != 0;
  body.channel_grid = side.grid == kChannelGrid;
  if (!body.channel_grid) {
    body.midpoint = side.format == kInt4   ? Nibble::kMidpoint
                    : side.format == kInt3 ? ThreeBits::kMidpoint
                    : side.format == kInt2 ? TwoBits::kMidpoint
                                           : 0.0f;
  }
  return body;
}

// Where batch row b keeps column t of its body: a page, or the row's own storage, and the column in
// front of which that begins.
struct Place {
  int64_t row, first;
};

inline Place place_of(const KvquantPages& pages, int64_t b, int64_t t) {
  if (pages.table == nullptr) return {b, 0};
  const int64_t page = t / pages.page_length;
  return {pages.table[b * pages.table_stride + page], page * pages.page_length};
}

// The row of the storage that holds the exact copies of batch row b.
inline int64_t exact_row(const KvquantPages& pages, int64_t b) {
  return pages.table == nullptr ? b : pages.exact == nullptr ? 0 : pages.exact[b];
}

// The body around column t of batch row b. Its columns have the same numbers as without pages.
inline Body body_at(const KvquantSide& side, const KvquantPages& pages, int64_t dtype, int64_t b,
                    int64_t h, int64_t t) {
  const Place place = place_of(pages, b, t);
  Body body = body_of(side, dtype, place.row, h);
  if (place.first == 0) return body;
  body.data -= place.first * body.row_bytes;
  if (body.scale == nullptr) return body;
  const int64_t offset = (body.channel_grid ? place.first / body.group_length : place.first) *
                         (body.channel_grid ? body.head_dim : body.num_scales);
  body.scale -= offset;
  if (body.zero_point) body.zero_point -= offset;
  return body;
}

constexpr int64_t kRangeBlocks = 16;

// Keys on the channel grid: a range of blocks, and where their scales are stored; see folding.h.
struct BlockRange {
  int64_t begin = 0, end = 0;
  const uint16_t* scale[kRangeBlocks];

  // The complete blocks around column t, from a multiple of kRangeBlocks on, of a row that holds
  // `length` columns; an incomplete block is alone. `keys` is the body around the column.
  void set(const KvquantAttention& a, const Body& keys, int64_t b, int64_t h, int64_t t,
           int64_t length) {
    const int64_t block = t / keys.group_length;
    begin = block / kRangeBlocks * kRangeBlocks;
    end = std::min(begin + kRangeBlocks, length / keys.group_length);
    if (block >= end) {
      begin = block;
      end = block + 1;
    }
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t* scales = keys.scale;
      if (a.pages.table)
        scales = body_at(a.keys, a.pages, a.dtype, b, h, i * keys.group_length).scale;
      scale[i - begin] = scales + i * keys.head_dim;
    }
  }
};

inline void halves_to_floats(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::load((const Half*)(from + i)).store(to + i);
  for (; i < n; ++i) to[i] = to_float(Half{from[i]});
}

// Token grid: (code - midpoint) * scale, one scale per group of a row.
template <class Format>
struct TokenRows {
  const uint8_t* data;
  int64_t row_bytes, groups;
  int head_dim;
  float midpoint;
  alignas(64) float scale[kTile * kMaxHeadDim / 16];
  uint8_t group_of[kMaxHeadDim / 16];

  TokenRows(const Body& body, int64_t first, int columns)
      : data(body.data + first * body.row_bytes),
        row_bytes(body.row_bytes),
        groups(body.num_scales),
        head_dim(body.head_dim),
        midpoint(body.midpoint) {
    halves_to_floats(body.scale + first * groups, columns * groups, scale);
    for (int i = 0; i < head_dim / 16; ++i) group_of[i] = uint8_t(16 * i / body.group_length);
  }
  struct Row {
    const uint8_t* bytes;
    const float* scale;
  };
  Row row(int i) const { return {data + i * row_bytes, scale + i * groups}; }
  Vec load(const Row& row, int c) const {
    Vec x = Vec::decode(Format{}, row.bytes, c, head_dim);
    if (Format::kMidpoint != 0.0f) x = x - Vec(midpoint);
    return x * Vec(row.scale[group_of[c / 16]]);
  }
};

// Channel grid: zero point + code * scale, one of each per channel and block of columns.
template <class Format>
struct ChannelRows {
  const uint8_t* data;
  int64_t row_bytes;
  int head_dim, shift;
  bool has_zero;
  alignas(64) float scale[kTile / 16 * kMaxHeadDim], zero[kTile / 16 * kMaxHeadDim];

  ChannelRows(const Body& body, int64_t first, int columns)
      : data(body.data + first * body.row_bytes),
        row_bytes(body.row_bytes),
        head_dim(body.head_dim),
        shift(__builtin_ctzll(uint64_t(body.group_length))),
        has_zero(body.zero_point != nullptr) {
    int64_t block = first >> shift, blocks = ((first + columns - 1) >> shift) - block + 1;
    halves_to_floats(body.scale + block * head_dim, blocks * head_dim, scale);
    if (has_zero) halves_to_floats(body.zero_point + block * head_dim, blocks * head_dim, zero);
  }
  struct Row {
    const uint8_t* bytes;
    const float *scale, *zero;
  };
  Row row(int i) const {
    // A tile begins where a block does, or lies inside one.
    int64_t offset = int64_t(i >> shift) * head_dim;
    return {data + i * row_bytes, scale + offset, zero + offset};
  }
  Vec load(const Row& row, int c) const {
    Vec x = Vec::decode(Format{}, row.bytes, c, head_dim), s = Vec::load(row.scale + c);
    return has_zero ? Vec::fma(x, s, Vec::load(row.zero + c)) : x * s;
  }
};

// Elements that are not quantized, one row after the other.
template <class T>
struct DenseRows {
  const uint8_t* data;
  int64_t row_bytes;
  int head_dim;

  DenseRows(const Body& body, int64_t first, int)
      : data(body.data + first * body.row_bytes),
        row_bytes(body.row_bytes),
        head_dim(body.head_dim) {}
  using Row = const T*;
  Row row(int i) const { return (const T*)(data + i * row_bytes); }
  Vec load(Row row, int c) const { return Vec::load(row + c); }
};

// Exact copies (ring slots and sinks), each row at an address of its own.
template <class T>
struct ScatteredRows {
  const uint8_t* const* place;
  int head_dim;
  using Row = const T*;
  Row row(int i) const { return (const T*)place[i]; }
  Vec load(Row row, int c) const { return Vec::load(row + c); }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
