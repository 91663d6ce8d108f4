// Which query rows and which columns a block attends to.
//
// There are four kinds of (query row, column), by where the row reads the column's key and value. A
// block attends to one kind:
//
//   keys    values
//   stored  stored   nearly all; a block takes one split, consecutive columns (partials.h)
//   copied  copied   the newest columns, and sinks
//   copied  stored   channel grid: the block of the newest column, older than `recent_length`,
//                    where the values have no blocks, or shorter ones; or dense values
//   stored  copied   the same the other way around
//
// hf_kvquant/states.py has the rule. Every (query row, column) belongs to one block, and the
// results of all blocks are merged alike. The last three kinds take a list: sink slots, then a
// range of columns.
#pragma once

#include "cuda/pages.h"
#include "cuda/specialisation.h"
#include "kvquant/visibility.h"

namespace kvquant {

template <class From, class To>
struct SameConst {
  using Type = To;
};
template <class From, class To>
struct SameConst<const From, To> {
  using Type = const To;
};

// The batch row and kv head of a block. Methods compute what is rarely needed on demand: keeping it
// would take registers.
struct Place {
  const KvquantAttention& a;
  int kv_len, kv_head;

  KVQUANT_DEVICE explicit Place(const KvquantAttention& a)
      : a(a),
        kv_len(length(a, block_index_z() / kShares)),
        kv_head(block_index_y() / row_tiles()) {}
  static KVQUANT_DEVICE int length(const KvquantAttention& a, int batch) {
    const int64_t* const at = kPaged ? a.pages.lengths + batch : a.length;
    if (at == nullptr) return int(a.kv_len);
    const int64_t length = global_load(at);
    return int(length < a.kv_len ? length : a.kv_len);
  }
  KVQUANT_DEVICE int batch() const { return block_index_z() / kShares; }
  // The share (specialisation.h) of the values that the block sums up.
  static KVQUANT_DEVICE int share() { return block_index_z() % kShares; }
  // The share of a row that the block reads: keys have one.
  template <class Stored>
  static KVQUANT_DEVICE int part() {
    return Stored::kParts > 1 ? share() : 0;
  }
  KVQUANT_DEVICE int row_tiles() const { return grid_size_y() / int(a.num_kv_heads); }
  KVQUANT_DEVICE int first_position() const { return kv_len - int(a.q_len); }

  // The address in `p` of this kv head at an index along the first axis.
  template <class T>
  KVQUANT_DEVICE T* of_head(T* p, const int64_t (&stride)[2], int64_t index) const {
    using Byte = typename SameConst<T, uint8_t>::Type;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + index * stride[0] +
                                kv_head * stride[1]);
  }
  // The same for what is stored of a column, and for the exact copies of this batch row.
  template <class T>
  KVQUANT_DEVICE T* of_column(T* p, const int64_t (&stride)[2], int column) const {
    return of_head(p, stride, storage_of(a.pages, batch(), column));
  }
  template <class T>
  KVQUANT_DEVICE T* of_copies(T* p, const int64_t (&stride)[2]) const {
    return of_head(p, stride, exact_of(a.pages, batch()));
  }
};

// The query rows of a block: kRows of the q_per_kv * q_len rows of its kv head. Row r is query
// r % q_len of its head r / q_len. Cheap to construct, so it is not kept in registers.
struct QueryRows {
  int first_head, q_len, first, count;

  KVQUANT_DEVICE explicit QueryRows(const Place& p) {
    const int q_per_kv = int(p.a.num_heads) / int(p.a.num_kv_heads), tiles = p.row_tiles();
    q_len = int(p.a.q_len);
    first_head = p.kv_head * q_per_kv;
    first = (block_index_y() - p.kv_head * tiles) * kRows;
    count = q_per_kv * q_len;
  }
  KVQUANT_DEVICE bool exists(int row) const { return row < kRows && first + row < count; }
  // Rows beyond the last one repeat it.
  KVQUANT_DEVICE int wrapped(int row) const { return exists(row) ? first + row : count - 1; }
  KVQUANT_DEVICE int head(int row) const { return first_head + wrapped(row) / q_len; }
  KVQUANT_DEVICE int query(int row) const { return wrapped(row) % q_len; }
  // The index among the rows `[batch, num_heads, q_len]` of the output.
  KVQUANT_DEVICE int64_t output_row(const Place& p, int row) const {
    return (int64_t(p.batch()) * p.a.num_heads + head(row)) * q_len + query(row);
  }
};

// The exact copies of one head, keys or values.
struct Copies {
  const uint8_t *ring, *sink;
  int ring_length, row_bytes, recent_length, block_length;  // block_length 1: no block rule

  template <class Stored>
  static KVQUANT_DEVICE Copies of(const KvquantSide& side, const Place& p) {
    constexpr int kShareBytes = kElementBytes * Stored::Codec::kChannels;
    const int offset = p.part<Stored>() * kShareBytes;
    Copies c;
    c.ring = side.recent && Stored::kScaled ? p.of_copies(side.recent, side.recent_stride) + offset
                                            : nullptr;
    c.sink = has_sinks<Stored>(side) ? p.of_copies(side.sink, side.sink_stride) + offset : nullptr;
    c.ring_length = int(side.ring_length);
    c.row_bytes = kShareBytes * Stored::kParts;
    c.recent_length = int(p.a.recent_length);
    c.block_length = Stored::kChannelGrid ? Stored::kGroup : 1;
    return c;
  }
  // A dense body needs no copies.
  template <class Stored>
  static KVQUANT_DEVICE bool has_sinks(const KvquantSide& side) {
    return Stored::kScaled && side.sink != nullptr;
  }
  // The first column whose copy in the ring the query at `position` reads, or kv_len.
  KVQUANT_DEVICE int dense_from(int position, int kv_len) const {
    return ring ? first_exact(position, recent_length, block_length) : kv_len;
  }
  // The copy of a column, in a sink slot or (slot -1) in the ring; null if there is none.
  KVQUANT_DEVICE const uint8_t* row(int column, int slot) const {
    if (slot >= 0 && sink) return sink + int64_t(slot) * row_bytes;
    return ring ? ring + int64_t(column % ring_length) * row_bytes : nullptr;
  }
};

// The sinks of a batch row.
struct Sinks {
  const Place& p;
  int last = -1;  // the largest column that is a sink

  // All lanes of a warp call this.
  KVQUANT_DEVICE explicit Sinks(const Place& p) : p(p) {
    if (count() == 0) return;
    for (int i = lane_index(); i < count(); i += 32) {
      const int mine = column(i);
      if (mine > last) last = mine;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int other = shuffle_xor(last, lanes);
      if (other > last) last = other;
    }
  }
  KVQUANT_DEVICE int count() const {
    const bool some =
        Copies::has_sinks<StoredKeys>(p.a.keys) || Copies::has_sinks<StoredValues>(p.a.values);
    return some && p.a.sink_positions ? int(p.a.num_sinks) : 0;
  }
  // The column in a slot, or -1.
  KVQUANT_DEVICE int column(int slot) const {
    const auto* row = reinterpret_cast<const uint8_t*>(p.a.sink_positions) +
                      p.batch() * p.a.sink_positions_stride;
    const int column = global_load(reinterpret_cast<const int32_t*>(row) + slot);
    return column < p.kv_len ? column : -1;
  }
  // Ranges of columns skip the sinks, because lists take them by their slots.
  KVQUANT_DEVICE bool has(int wanted) const {
    bool found = false;
    if (wanted <= last) {
      for (int i = 0; i < count(); ++i) found |= column(i) == wanted;
    }
    return found;
  }
};

// The columns that a block attends to: a range or, for lists, sink slots followed by a range.
template <bool kIsList>
struct Columns {
  static constexpr bool kInOrder = !kIsList;
  const Sinks& sinks;
  int slots, begin, count;

  KVQUANT_DEVICE Columns(const Sinks& sinks, bool with_sinks, int from, int to)
      : sinks(sinks), slots(kIsList && with_sinks ? sinks.count() : 0), begin(from) {
    count = slots + (to > from ? to - from : 0);
  }
  // The column of entry i, or -1.
  KVQUANT_DEVICE int column(int i) const {
    if (i >= count) return -1;
    if constexpr (kInOrder) return begin + i;
    return i < slots ? sinks.column(i) : begin + i - slots;
  }
  KVQUANT_DEVICE bool is_slot(int i) const { return kIsList && i < slots; }
  KVQUANT_DEVICE int slot(int i) const { return is_slot(i) ? i : -1; }
};

}  // namespace kvquant
