// Which columns of a tile a query row sees, and where their keys and values are read. A set of
// columns is a word of 64 bits; bit i is column first + i.
//
//   visible   by causal order, a padding mask or a complete mask
//   dense     read from an exact copy instead of the body (the stored codes): from the ring, which
//             holds the newest columns, or from a sink
#pragma once

#include "cpu/codecs.h"
#include "kvquant/visibility.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

inline uint64_t lowest_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 64 ? kAllColumns : (uint64_t(1) << n) - 1;
}

// The columns from `start` on.
inline uint64_t bits_from(int64_t start, int64_t first) { return ~lowest_bits(start - first); }

template <class Load>
uint64_t bits_where(int n, Load attends) {
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint64_t(attends(i)) << i;
  return bits;
}

// The number of columns of batch row b.
inline int64_t length_of(const KvquantAttention& a, int64_t b) {
  return a.pages.table ? a.pages.lengths[b] : a.kv_len;
}

struct MaskRow {
  const KvquantAttention* a;
  const uint8_t* row;  // the mask's row for this batch row, head and query
  int64_t position;    // of the query

  MaskRow() = default;
  MaskRow(const KvquantAttention& a, int64_t b, int64_t head, int64_t j)
      : a(&a), row(a.mask), position(length_of(a, b) - a.q_len + j) {
    if (row) row += b * a.mask_stride[0] + head * a.mask_stride[1] + j * a.mask_stride[2];
  }

  // Which of the n columns from `first` on the query sees; an additive mask is copied to `bias`.
  uint64_t visible(int64_t first, int n, float* bias) const {
    const int64_t step = a->mask_stride[3];
    const uint8_t* p = row + first * step;
    switch (a->mask_kind) {
      case kNoMask:
        return lowest_bits(position + 1 - first) & lowest_bits(n);
      case kPaddingMask:
        return lowest_bits(position + 1 - first) & nonzero(p, step, n);
      case kBoolMask:
        return bits_where(n, [&](int i) { return p[i * step] != 0; });
      case kAddFloat32:
        return additive<float>(p, step, n, bias);
      case kAddFloat16:
        return additive<Half>(p, step, n, bias);
      default:
        return additive<BFloat16>(p, step, n, bias);
    }
  }

 private:
  uint64_t nonzero(const uint8_t* p, int64_t step, int n) const {
    if (a->mask_width == 1) return bits_where(n, [&](int i) { return p[i * step] != 0; });
    if (a->mask_width == 4)
      return bits_where(n, [&](int i) { return *(const int32_t*)(p + i * step) != 0; });
    return bits_where(n, [&](int i) { return *(const int64_t*)(p + i * step) != 0; });
  }
  template <class T>
  uint64_t additive(const uint8_t* p, int64_t step, int n, float* bias) const {
    const float limit = mask_limit(a->mask_kind);
    for (int i = 0; i < n; ++i) bias[i] = to_float(*(const T*)(p + i * step));
    return bits_where(n, [&](int i) { return !(bias[i] <= limit); });
  }
};

// The exact copies of one head, keys or values.
struct DenseCopies {
  const uint8_t *ring, *sink;
  int64_t ring_length, row_bytes;
  int64_t recent_length, block_length;  // block_length 1: no block rule

  DenseCopies(const KvquantSide& side, const KvquantAttention& a, int64_t b, int64_t h)
      : ring(side.recent && side.format != kDense
                 ? side.recent + exact_row(a.pages, b) * side.recent_stride[0] +
                       h * side.recent_stride[1]
                 : nullptr),
        sink(side.sink
                 ? side.sink + exact_row(a.pages, b) * side.sink_stride[0] + h * side.sink_stride[1]
                 : nullptr),
        ring_length(side.ring_length),
        row_bytes(side.head_dim * dtype_bytes(a.dtype)),
        recent_length(a.recent_length),
        block_length(side.format != kDense && side.grid == kChannelGrid ? side.group_length : 1) {}

  // The first column whose copy in the ring the query at `position` reads, or kv_len.
  int64_t dense_from(int64_t position, int64_t kv_len) const {
    return ring ? first_exact(position, recent_length, block_length) : kv_len;
  }

  // Prefetches the ring's copy of column t.
  void prefetch(int64_t t) const {
    if (ring == nullptr) return;
    const uint8_t* p = ring + t % ring_length * row_bytes;
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }

  // Sets place[i] to the copy of each column in `bits`: the sink's if it has one (sink_slot, -1:
  // none), else the ring's.
  void find(uint64_t bits, int64_t first, const int16_t* sink_slot, const uint8_t** place) const {
    for (; bits; bits &= bits - 1) {
      int i = __builtin_ctzll(bits);
      place[i] = sink && sink_slot[i] >= 0 ? sink + sink_slot[i] * row_bytes
                                           : ring + (first + i) % ring_length * row_bytes;
    }
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
