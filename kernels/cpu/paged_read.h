// De-quantizes the stored columns of one request for a long chunk of a prompt behind them. The
// elements are those that `quantization.py` defines: products and sums are rounded one by one.
#pragma once

#include "cpu/nibbles.h"
#include "cpu/rotation.h"
#include "cpu/thread_pool.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Format>
Vec element(const TokenRows<Format>& tile, const typename TokenRows<Format>::Row& row, int c) {
  return tile.load(row, c);
}
template <class Format>
Vec element(const ChannelRows<Format>& tile, const typename ChannelRows<Format>::Row& row, int c) {
  const Vec x = Vec::decode(Format{}, row.bytes, c, tile.head_dim) * Vec::load(row.scale + c);
  return tile.has_zero ? x + Vec::load(row.zero + c) : x;
}

// n columns from `first` on, to rows of head_dim elements.
template <class T, class Rows>
void read_rows(const Body& body, int64_t first, int n, T* to) {
  const Rows tile(body, first, n);
  alignas(64) float x[kMaxHeadDim];
  for (int i = 0; i < n; ++i, to += body.head_dim) {
    const auto row = tile.row(i);
    for (int c = 0; c < body.head_dim; c += Vec::kWidth) element(tile, row, c).store(x + c);
    if (body.rotated) rotate(x, body.head_dim);
    for (int c = 0; c < body.head_dim; c += Vec::kWidth) Vec::load(x + c).store(to + c);
  }
}

template <class T>
void read_tile(const Body& body, int64_t first, int n, T* to) {
  const bool channel = body.channel_grid;
  switch (body.format) {
    case kInt8:
      return channel ? read_rows<T, ChannelRows<Unsigned8>>(body, first, n, to)
                     : read_rows<T, TokenRows<Signed8>>(body, first, n, to);
    case kFp8:
      return channel ? read_rows<T, ChannelRows<E4M3>>(body, first, n, to)
                     : read_rows<T, TokenRows<E4M3>>(body, first, n, to);
    default:  // formats of fewer bits are expanded to nibbles
      return channel ? read_rows<T, ChannelRows<Nibble>>(body, first, n, to)
                     : read_rows<T, TokenRows<Nibble>>(body, first, n, to);
  }
}

template <class T>
void read_pages(const KvquantRead& a) {
  const int64_t tiles = (a.length + kTile - 1) / kTile;
  auto item = [&](int64_t i) {
    const int64_t h = i / tiles, first = i % tiles * kTile;
    const int n = int(a.length - first < kTile ? a.length - first : kTile);
    alignas(64) uint8_t tile[kTileBytes];
    const Body body = in_nibbles(body_at(a.side, a.pages, a.dtype, 0, h, first), first, n, tile);
    read_tile(body, first, n, (T*)(a.output + h * a.output_stride) + first * body.head_dim);
  };
  parallel_for(a.num_kv_heads * tiles, a.threads, item);
}

inline bool paged_read(const KvquantRead& a) {
  if (a.dtype == kFloat32) {
    read_pages<float>(a);
  } else if (a.dtype == kFloat16) {
    read_pages<Half>(a);
  } else {
    read_pages<BFloat16>(a);
  }
  return true;
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
