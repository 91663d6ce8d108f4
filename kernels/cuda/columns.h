// Where a block stands, which columns it takes, and which of them a query row sees.
//
// A block takes one kind of (query row, column) pairs, by where the row reads key and value:
//
//   keys    values
//   stored  stored   most: a split of consecutive columns; see the rule in hf_kvquant/states.py
//   copied  copied   the newest columns, and sinks
//   copied  stored   channel grid: the block of the newest column, older than `recent_length`
//   stored  copied   dense keys beside quantized values
//
// So every pair is taken once, each kind is one plain pass, and the partial results of all kinds are
// merged like those of splits. The last three take a list: sink slots, then a range of columns.
#pragma once

#include "cuda/specialisation.h"

namespace kvquant {

// A (batch row, kv head, 16 query rows). Query row r of a kv head is query r % q_len of its head
// r / q_len.
struct Place {
  const KvquantAttention& a;
  int batch, kv_head, row0, rows, q_len, q_per_kv, kv_len;

  KVQUANT_DEVICE explicit Place(const KvquantAttention& a)
      : a(a),
        batch(block_index_z()),
        q_len(int(a.q_len)),
        q_per_kv(int(a.num_heads / a.num_kv_heads)),
        kv_len(length(a)) {
    rows = q_per_kv * q_len;
    const int tiles = (rows + kRows - 1) / kRows;
    kv_head = block_index_y() / tiles;
    row0 = block_index_y() % tiles * kRows;
  }
  static KVQUANT_DEVICE int length(const KvquantAttention& a) {
    if (a.length == nullptr) return int(a.kv_len);
    const int64_t length = global_load(a.length);
    return int(length < a.kv_len ? length : a.kv_len);
  }
  // Of row `row` of the block; rows beyond the last one repeat it.
  KVQUANT_DEVICE int query_row(int row) const { return row0 + row < rows ? row0 + row : rows - 1; }
  KVQUANT_DEVICE int head(int row) const {
    return kv_head * q_per_kv + query_row(row) / q_len;
  }
  KVQUANT_DEVICE int query(int row) const { return query_row(row) % q_len; }
  KVQUANT_DEVICE bool exists(int row) const { return row0 + row < rows; }
  KVQUANT_DEVICE int first_position() const { return kv_len - q_len; }
};

// The exact copies of one head, keys or values.
struct Copies {
  const uint8_t *ring, *sink;
  int ring_length, row_bytes, recent_length, block_length;  // block_length 1: no block rule

  template <class Stored>
  static KVQUANT_DEVICE Copies of(const KvquantSide& side, const Place& p) {
    Copies c;
    const bool has_ring = side.recent != nullptr && Stored::kScaled;
    c.ring = has_ring ? side.recent + p.batch * side.recent_stride[0] +
                            p.kv_head * side.recent_stride[1]
                      : nullptr;
    c.sink = side.sink ? side.sink + p.batch * side.sink_stride[0] + p.kv_head * side.sink_stride[1]
                       : nullptr;
    c.ring_length = int(side.ring_length);
    c.row_bytes = 2 * Stored::Codec::kChannels;
    c.recent_length = int(p.a.recent_length);
    c.block_length = Stored::kChannelGrid ? Stored::kGroup : 1;
    return c;
  }
  // The first column that the query at `position` reads from the ring.
  KVQUANT_DEVICE int dense_from(int position, int kv_len) const {
    if (ring == nullptr) return kv_len;
    const int recent = position - recent_length + 1;
    const int block = block_length > 1 ? position - position % block_length : position + 1;
    const int start = recent < block ? recent : block;
    return start > 0 ? start : 0;
  }
  // Null where there is no copy.
  KVQUANT_DEVICE const uint8_t* row(int column, int slot) const {
    if (slot >= 0 && sink) return sink + int64_t(slot) * row_bytes;
    return ring ? ring + int64_t(column % ring_length) * row_bytes : nullptr;
  }
};

// What a block takes. Entry i is sink slot i for i < sinks, else column begin + i - sinks.
struct Columns {
  const int32_t* sink_positions;  // of this batch row, or null
  int num_sinks, last_sink;       // last_sink: the largest column that is a sink, or -1
  int sinks, begin, count, kv_len;

  KVQUANT_DEVICE explicit Columns(const Place& p)
      : sink_positions(nullptr), num_sinks(0), last_sink(-1), sinks(0), begin(0), count(0),
        kv_len(p.kv_len) {
    if (p.a.sink_positions == nullptr) return;
    sink_positions = reinterpret_cast<const int32_t*>(
        reinterpret_cast<const uint8_t*>(p.a.sink_positions) + p.batch * p.a.sink_positions_stride);
    num_sinks = int(p.a.num_sinks);
    for (int i = 0; i < num_sinks; ++i) {
      const int column = global_load(sink_positions + i);
      if (column < kv_len && column > last_sink) last_sink = column;
    }
  }
  KVQUANT_DEVICE void take_range(int from, int to) {
    begin = from;
    count = sinks + (to > from ? to - from : 0);
  }
  // The column of an entry, or -1.
  KVQUANT_DEVICE int column(int i) const {
    if (i >= count) return -1;
    if (i >= sinks) return begin + i - sinks;
    const int column = global_load(sink_positions + i);
    return column < kv_len ? column : -1;
  }
  KVQUANT_DEVICE int slot(int i) const { return i < sinks ? i : -1; }
  // Sinks are taken by their slots, and have copies: no range holds them.
  KVQUANT_DEVICE bool is_sink(int column) const {
    bool found = false;
    if (column <= last_sink) {
      for (int i = 0; i < num_sinks; ++i) found |= global_load(sink_positions + i) == column;
    }
    return found;
  }
};

}  // namespace kvquant
