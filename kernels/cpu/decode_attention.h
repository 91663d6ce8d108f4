// Attention of a few new queries over one quantized cache.
//
//   work item    (batch row, kv head, split of its columns), on any thread; with pages, rows
//                have lengths of their own, and a long row has more splits
//     chunk      up to kMaxRows query rows; all q_per_kv * q_len rows of a kv head share each load
//                of the cache (GQA packing)
//       tile     64 columns at multiples of 64
//         visible    which row sees which column, and where its key and value are read
//         scores     rotated queries x stored keys; queries x exact copies where there are any
//         softmax    scores -> weights, relative to the largest score so far
//         values     weights x stored values, and weights x exact copies, in two accumulators:
//                    the stored values may be rotated
//     merge      into the splits before it, if these are all merged: in their order
//   the last work item of a head merges the splits that are left, in their order, and writes the
//   output
//
// A work item's result depends on nothing but the item, and splits are always merged one by one, from
// the first on, so the output is the same for any number of threads, and for a row alone and in a
// batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/columns.h"
#include "cpu/float_methods.h"
#include "cpu/nibbles.h"
#include "cpu/rotation.h"
#include "cpu/thread_pool.h"
#include "kvquant/constants.h"
#include "kvquant/softmax_state.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kSplit = 1024, kLongestSplit = 4096;  // columns of a work item
constexpr int kManySplits = 32;        // of a head: with more of them, they become longer instead
constexpr int kInlineBytes = 1 << 18;  // less is read sooner than another thread wakes up
constexpr int kCopiesAhead = 12;       // exact copies that a tile prefetches

// The columns of a split of a row. A split costs as much as half a tile.
inline int64_t split_length(int64_t columns) {
  return std::min<int64_t>(std::max<int64_t>(columns / (kManySplits * kSplit), 1) * kSplit,
                           kLongestSplit);
}
inline int64_t splits_of_row(int64_t columns) {
  const int64_t length = split_length(columns);
  return (columns + length - 1) / length;
}

inline Vec tanh_of(Vec x) {
  Vec t = Vec::exp2(Vec(-2.0f * kLog2e) * Vec::abs(x));
  Vec y = (Vec(1.0f) - t) / (Vec(1.0f) + t);
  return Vec::where(Vec::less(x, Vec(0.0f)), Vec(0.0f) - y, y);
}

// 2^x for an output of type T.
template <class T>
inline Vec exp2_for(Vec x) {
  return std::is_same<T, float>::value ? Vec::exp2(x) : Vec::exp2_of_16_bits(x);
}

// A softmax state while its scores arrive. Each lane of a vector has a sum of its own; they are
// added up once, at the end. `max` may be up to kLag below the largest score, so that the
// accumulated values are seldom rescaled.
struct RunningSoftmax {
  static constexpr float kLag = 8.0f;
  // Without a cap or a bias scores are scaled in the step that makes them exponents, and `max` is a
  // score before that, so it and `lag` are in units of `unit`.
  float unit = 1.0f, lag = kLag, max = -__builtin_inff();
  alignas(64) float sums[Vec::kWidth] = {};

  SoftmaxState finished() const {
    SoftmaxState whole;
    whole.max = max * unit;
    whole.sum = Vec::sum(Vec::load(sums));
    return whole;
  }

  // Turns the scores of a tile into weights, 0 for hidden columns. Returns the factor by which the
  // caller rescales the values accumulated so far. T: the type of the output, whose precision the
  // weights have. It is inlined, so that calls which see all columns and have no bias skip both.
  template <class T>
  KVQUANT_INLINE float update(float* x, uint64_t visible, const float* bias, float scaling,
                              float softcap) {
    constexpr int W = Vec::kWidth, kVecs = kTile / W;
    const Vec hidden(-__builtin_inff());
    Vec s[kVecs], largest = hidden;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) s[i] = Vec::load(x + i * W);
    if (softcap != 0.0f || bias || !(scaling > 0.0f)) {
      for (Vec& v : s) v = v * Vec(scaling);
    } else if (unit != scaling) {
      unit = scaling;
      lag = kLag / unit;
    }
    if (softcap != 0.0f)
      for (Vec& v : s) v = Vec(softcap) * tanh_of(v * Vec(1.0f / softcap));
    if (bias)
      for (int i = 0; i < kVecs; ++i) s[i] = s[i] + Vec::load(bias + i * W);
    if (visible != kAllColumns)
      for (int i = 0; i < kVecs; ++i) s[i] = Vec::where(uint32_t(visible >> i * W), s[i], hidden);
#pragma GCC unroll 8
    for (Vec v : s) largest = Vec::max(v, largest);
    Vec sum = Vec::load(sums);
    float factor = 1.0f;
    if (Vec::less(Vec(max + lag), largest) != 0) {
      const float before = max;
      max = Vec::largest(largest);
      factor = expf((before - max) * unit);
      sum = sum * Vec(factor);
    }
    float base = max;
    if (max == -__builtin_inff()) {  // no score is above -infinity: all weights are 0, or NaN
      base = 0.0f;
      for (int i = 0; i < kVecs; ++i) visible &= ~(uint64_t(Vec::not_nan(s[i])) << i * W);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) s[i] = exp2_for<T>((s[i] - Vec(base)) * Vec(unit * kLog2e));
    if (visible != kAllColumns)
      for (int i = 0; i < kVecs; ++i)
        s[i] = Vec::where(uint32_t(visible >> i * W), s[i], Vec(0.0f));
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      s[i].store(x + i * W);
      sum = sum + s[i];
    }
    sum.store(sums);
    return factor;
  }
};

inline void scale_row(float* x, size_t n, float factor) {
  for (size_t c = 0; c < n; c += Vec::kWidth) (Vec::load(x + c) * Vec(factor)).store(x + c);
}

template <class T>
void load_row(const uint8_t* from, int n, float* to) {
  for (int c = 0; c < n; c += Vec::kWidth) Vec::load((const T*)from + c).store(to + c);
}

template <class T>
struct DecodeAttention {
  const KvquantAttention& a;
  const KeyMethod keys;
  const ValueMethod values;
  const int64_t q_per_kv, rows, splits;  // splits of a row without pages
  const int k_dim, v_dim;
  const int64_t chunks;
  // Of splits that are not merged; those of a head's first split have all that are. The sums are of
  // values as stored, which may be rotated.
  SoftmaxState* states;             // `[batch, num_kv_heads, splits, rows]`
  float* sums;                      // `[batch, num_kv_heads, splits, rows, v_dim]`
  int64_t* first_item;              // `[batch + 1]` with pages: the first work item of each row
  std::atomic<int32_t>* remaining;  // `[batch, num_kv_heads]`: splits that are not yet done
  std::atomic<int32_t>* merged;     // `[batch, num_kv_heads, chunks]`: splits that are merged
  std::atomic<bool> no_memory{false};

  DecodeAttention(const KvquantAttention& a, KeyMethod keys, ValueMethod values)
      : a(a),
        keys(keys),
        values(values),
        q_per_kv(a.num_heads / a.num_kv_heads),
        rows(q_per_kv * a.q_len),
        splits(splits_of_row(a.kv_len)),
        k_dim(int(a.keys.head_dim)),
        v_dim(int(a.values.head_dim)),
        chunks((rows + kMaxRows - 1) / kMaxRows) {}

  int64_t splits_of(int64_t b) const {
    return a.pages.table ? splits_of_row(a.pages.lengths[b]) : splits;
  }
  int64_t first_of(int64_t b) const {
    return a.pages.table ? first_item[b] : b * a.num_kv_heads * splits;
  }
  // The batch row of work item i.
  int64_t row_of(int64_t i) const {
    if (a.pages.table == nullptr) return i / (a.num_kv_heads * splits);
    return std::upper_bound(first_item, first_item + a.batch, i) - first_item - 1;
  }

  bool run() {
    const int64_t heads = a.batch * a.num_kv_heads;
    int64_t items = heads * splits, columns = a.batch * a.kv_len;
    if (a.pages.table) {
      items = columns = 0;
      for (int64_t b = 0; b < a.batch; ++b) {
        items += a.num_kv_heads * splits_of(b);
        columns += a.pages.lengths[b];
      }
    }
    auto* memory = static_cast<uint8_t*>(
        scratch(kCallScratch, items * rows * (sizeof(SoftmaxState) + v_dim * sizeof(float)) +
                                  (a.batch + 1) * sizeof(int64_t) + heads * (1 + chunks) * 4));
    if (memory == nullptr) return false;
    first_item = reinterpret_cast<int64_t*>(memory);
    sums = reinterpret_cast<float*>(first_item + a.batch + 1);
    states = reinterpret_cast<SoftmaxState*>(sums + items * rows * v_dim);
    remaining = reinterpret_cast<std::atomic<int32_t>*>(states + items * rows);
    int64_t next = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      first_item[b] = next;
      next += a.num_kv_heads * splits_of(b);
    }
    for (int64_t i = 0; i < heads; ++i)
      new (&remaining[i]) std::atomic<int32_t>(int32_t(splits_of(i / a.num_kv_heads)));
    merged = remaining + heads;
    for (int64_t i = 0; i < heads * chunks; ++i) new (&merged[i]) std::atomic<int32_t>(0);
    const int64_t bytes =
        a.num_kv_heads * columns * (row_bytes(a.keys, a.dtype) + row_bytes(a.values, a.dtype));
    // Consecutive items read consecutive memory, because a thread's next item is most likely the
    // next split.
    auto item = [this](int64_t i, int64_t previous) {
      const int64_t b = row_of(i), in_row = i - first_of(b);
      const int64_t h = in_row / splits_of(b), head = b * a.num_kv_heads + h;
      // If this thread took another split of the same head before, what it made of the queries is
      // still in its memory; if that was the split before this one, its first tiles are prefetched.
      const int64_t split = in_row % splits_of(b);
      const Before before{chunks == 1 && i - split <= previous,
                          !a.pages.table && split > 0 && previous == i - 1};
      attend(b, h, split, i, before);
      if (remaining[head].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(b, h);
    };
    parallel_for(items, bytes < kInlineBytes ? 1 : a.threads, item);
    return !no_memory;
  }

  // What a thread's previous work item left.
  struct Before {
    bool queries, prefetched;
  };

  void attend(int64_t b, int64_t h, int64_t split, int64_t item, Before before) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t row = chunk * kMaxRows;
      attend_chunk(b, h, split, item, before, int(row),
                   int(std::min<int64_t>(rows - row, kMaxRows)),
                   merged[(b * a.num_kv_heads + h) * chunks + chunk]);
    }
  }

  // Merges a split of one row into the `into`-th slot of `states` and `sums`.
  void merge_row(int64_t into, const SoftmaxState& state, const float* sum) {
    const SoftmaxState::Factors factors = states[into].merge(state);
    const Vec ours(factors.ours), theirs(factors.theirs);
    float* total = sums + into * v_dim;
    for (int c = 0; c < v_dim; c += Vec::kWidth)
      Vec::fma(Vec::load(total + c), ours, Vec::load(sum + c) * theirs).store(total + c);
  }

  // Prefetches the first tiles of a split; each tile prefetches one that is kTilesAhead further on.
  static void prefetch(const Body& body, int64_t first) {
    const uint8_t* p = body.data + first * body.row_bytes;
    for (int64_t i = 0; i < kTilesAhead * kTile * body.row_bytes; i += 64)
      __builtin_prefetch(p + i, 0, 2);
  }

  // With pages: what the tile at `first` prefetches may lie in another page.
  void look_ahead(const KvquantSide& side, int64_t b, int64_t h, int64_t first, Body& body) const {
    const int64_t then = first + kTilesAhead * kTile;
    if (then >= length_of(a, b)) return;
    const Body next = body_at(side, a.pages, a.dtype, b, h, then);
    body.ahead = (next.data + then * next.row_bytes) - (body.data + first * body.row_bytes);
  }

  // Query row r of a kv head is query r % q_len of its head r / q_len.
  void attend_chunk(int64_t b, int64_t h, int64_t split, int64_t item, Before before, int row0,
                    int m, std::atomic<int32_t>& merged_splits) {
    const int64_t length = length_of(a, b), begin = split * split_length(length);
    const int64_t end = std::min(begin + split_length(length), length);
    Body k_body = body_at(a.keys, a.pages, a.dtype, b, h, begin);
    Body v_body = body_at(a.values, a.pages, a.dtype, b, h, begin);
    BlockRange range;
    k_body.range = &range;
    if (!before.prefetched) {
      prefetch(k_body, begin);
      prefetch(v_body, begin);
    }
    const DenseCopies k_copies(a.keys, a, b, h), v_copies(a.values, a, b, h);
    const int block = row_block(m), padded = (m + block - 1) / block * block;
    // What the methods read, tile by tile.
    alignas(64) uint8_t tile[kTileBytes];
    Body k_read = in_nibbles(k_body, begin, 0, tile), v_read = in_nibbles(v_body, begin, 0, tile);
    const auto k_tile = [&](int64_t first, int n) -> const Body& {
      return is_expanded(k_body) ? k_read = in_nibbles(k_body, first, n, tile) : k_body;
    };
    const auto v_tile = [&](int64_t first, int n) -> const Body& {
      return is_expanded(v_body) ? v_read = in_nibbles(v_body, first, n, tile) : v_body;
    };
    const size_t acc_dim = values.acc_floats(v_read);

    auto* memory = static_cast<float*>(
        scratch(kTaskScratch, sizeof(float) * padded * (2 * k_dim + acc_dim + v_dim + 3 * kTile) +
                                  padded * sizeof(RunningSoftmax) +
                                  keys.prepared_bytes(k_read, padded) + 64));
    if (memory == nullptr) {
      no_memory = true;
      return;
    }
    float* q = memory;                          // [padded, k_dim]
    float* q_body = q + padded * k_dim;         // [padded, k_dim], rotated if the keys are
    float* acc = q_body + padded * k_dim;       // [padded, acc_dim], sums of stored values
    float* acc_dense = acc + padded * acc_dim;  // [padded, v_dim], sums of exact copies
    float* p = acc_dense + padded * v_dim;      // [padded, kTile], scores, then weights
    float* p_dense = p + padded * kTile;
    float* bias = p_dense + padded * kTile;
    auto* softmax = reinterpret_cast<RunningSoftmax*>(bias + padded * kTile);
    void* prepared = softmax + padded;
    std::memset(acc, 0, sizeof(float) * padded * (acc_dim + v_dim));
    for (int r = 0; r < m; ++r) softmax[r] = RunningSoftmax();
    if (!before.queries) {
      std::memset(q + m * k_dim, 0, sizeof(float) * (padded - m) * k_dim);
      for (int r = 0; r < m; ++r) {
        int64_t g = (row0 + r) / a.q_len, j = (row0 + r) % a.q_len;
        load_row<T>(a.query + b * a.query_stride[0] + (h * q_per_kv + g) * a.query_stride[1] +
                        j * a.query_stride[2],
                    k_dim, q + r * k_dim);
      }
      std::memcpy(q_body, q, sizeof(float) * padded * k_dim);
      for (int r = 0; r < m && k_body.rotated; ++r) rotate(q_body + r * k_dim, k_dim);
      keys.prepare(k_read, q_body, padded, prepared);
    }

    // The mask of each row; the rows of padding repeat the last one.
    MaskRow mask[kMaxPaddedRows];
    int64_t k_dense_from[kMaxPaddedRows], v_dense_from[kMaxPaddedRows];
    for (int r = 0; r < padded; ++r) {
      const int row = row0 + (r < m ? r : m - 1);
      mask[r] = MaskRow(a, b, h * q_per_kv + row / a.q_len, row % a.q_len);
      k_dense_from[r] = k_copies.dense_from(mask[r].position, length);
      v_dense_from[r] = v_copies.dense_from(mask[r].position, length);
    }

    // From `plain` to `plain_end` every row sees all columns, and reads them from the body.
    int64_t plain = 0, plain_end = a.mask_kind == kNoMask ? end : 0;
    for (int r = 0; r < padded; ++r)
      plain_end = std::min({plain_end, mask[r].position + 1, k_dense_from[r], v_dense_from[r]});
    for (int64_t s = 0; a.sink_positions && s < a.num_sinks; ++s)
      plain = std::max<int64_t>(plain, sink_positions(b)[s] + 1);

    // Exact copies are read at the end of a row: tiles before prefetch a few each.
    int64_t next_copy = end;
    if (end == length)
      for (int r = 0; r < padded; ++r)
        next_copy = std::min({next_copy, k_dense_from[r], v_dense_from[r]});

    uint64_t all_columns[kMaxPaddedRows];
    std::fill(all_columns, all_columns + padded, kAllColumns);
    bool body_used = false, dense_used = false;
    for (int64_t first = begin; first < end; first += kTile) {
      const int n = int(end - first < kTile ? end - first : kTile);
      if (a.pages.table && first != begin && first % a.pages.page_length == 0) {
        k_body = body_at(a.keys, a.pages, a.dtype, b, h, first);
        k_body.range = &range;
        v_body = body_at(a.values, a.pages, a.dtype, b, h, first);
      }
      if (k_body.channel_grid && first >= range.end * k_body.group_length)
        range.set(a, k_body, b, h, first, length);
      if (a.pages.table) {
        look_ahead(a.keys, b, h, first, k_body);
        look_ahead(a.values, b, h, first, v_body);
      }
      for (int i = 0; i < kCopiesAhead && next_copy < end; ++i, ++next_copy) {
        k_copies.prefetch(next_copy);
        v_copies.prefetch(next_copy);
      }
      // Adds the scores p to the softmax of row r, and makes them weights.
      const auto update_row = [&](int r, uint64_t visible, const float* bias) KVQUANT_INLINED {
        const float factor = softmax[r].template update<T>(p + r * kTile, visible, bias,
                                                           float(a.scaling), float(a.softcap));
        if (factor == 1.0f) return;
        if (body_used) scale_row(acc + r * acc_dim, acc_dim, factor);
        if (dense_used) scale_row(acc_dense + r * v_dim, v_dim, factor);
      };
      if (first >= plain && first + kTile <= plain_end) {
        keys.score(k_tile(first, n), first, n, kAllColumns, q_body, prepared, padded, p);
        for (int r = 0; r < m; ++r) update_row(r, kAllColumns, nullptr);
        values.accumulate(v_tile(first, n), first, n, all_columns, p, padded, acc);
        body_used = true;
        continue;
      }
      int16_t sink_slot[kTile];
      const uint64_t sinks = find_sinks(b, first, n, sink_slot);
      // visible = k_body + k_copy = v_body + v_copy, per row.
      uint64_t visible[kMaxPaddedRows], v_from_body[kMaxPaddedRows], v_from_copy[kMaxPaddedRows],
          k_from_copy[kMaxPaddedRows];
      uint64_t any_k_body = 0, any_k_copy = 0, any_v_body = 0, any_v_copy = 0;
      for (int r = 0; r < padded; ++r) {
        visible[r] = mask[r].visible(first, n, bias + r * kTile);
        const uint64_t k_copy = bits_from(k_dense_from[r], first) | (k_copies.sink ? sinks : 0);
        const uint64_t v_copy = bits_from(v_dense_from[r], first) | (v_copies.sink ? sinks : 0);
        k_from_copy[r] = visible[r] & k_copy;
        v_from_copy[r] = visible[r] & v_copy;
        v_from_body[r] = visible[r] & ~v_copy;
        any_k_body |= visible[r] & ~k_copy;
        any_k_copy |= k_from_copy[r];
        any_v_body |= v_from_body[r];
        any_v_copy |= v_from_copy[r];
      }
      if ((any_k_body | any_k_copy) == 0) continue;

      if (any_k_body) {
        keys.score(k_tile(first, n), first, n, any_k_body, q_body, prepared, padded, p);
      }
      if (any_k_copy) {
        const uint8_t* place[kTile];
        k_copies.find(any_k_copy, first, sink_slot, place);
        score_tile(ScatteredRows<T>{place, k_dim}, any_k_copy, q, padded, p_dense);
        for (int r = 0; r < m; ++r) {
          for (int i = 0; i < kTile; i += Vec::kWidth) {
            float* x = p + r * kTile + i;
            Vec::where(uint32_t(k_from_copy[r] >> i), Vec::load(p_dense + r * kTile + i),
                       Vec::load(x))
                .store(x);
          }
        }
      }

      const bool additive = a.mask_kind >= kAddFloat32;
      for (int r = 0; r < m; ++r) update_row(r, visible[r], additive ? bias + r * kTile : nullptr);

      if (any_v_body) {
        values.accumulate(v_tile(first, n), first, n, v_from_body, p, padded, acc);
      }
      if (any_v_copy) {
        const uint8_t* place[kTile];
        v_copies.find(any_v_copy, first, sink_slot, place);
        accumulate_tile(ScatteredRows<T>{place, v_dim}, v_from_copy, p, padded, acc_dense);
      }
      body_used |= any_v_body != 0;
      dense_used |= any_v_copy != 0;
    }

    if (body_used) values.finish(v_read, m, acc);
    // If the splits before this one are merged, it is merged while its sums are in the L1 cache.
    const bool merges = split > 0 && merged_splits.load(std::memory_order_acquire) == split;
    for (int r = 0; r < m; ++r) {
      float* body = acc + r * acc_dim;
      float* copies = acc_dense + r * v_dim;
      if (dense_used) {
        if (v_body.rotated) rotate(copies, v_dim);
        for (int c = 0; c < v_dim; c += Vec::kWidth)
          (Vec::load(body + c) + Vec::load(copies + c)).store(body + c);
      }
      const int64_t slot = (merges ? item - split : item) * rows + row0 + r;
      if (merges) {
        merge_row(slot, softmax[r].finished(), body);
      } else {
        states[slot] = softmax[r].finished();
        std::memcpy(sums + slot * v_dim, body, sizeof(float) * v_dim);
      }
    }
    if (merges || split == 0) merged_splits.store(int32_t(split + 1), std::memory_order_release);
  }

  const int32_t* sink_positions(int64_t b) const {
    return (const int32_t*)((const uint8_t*)a.sink_positions + b * a.sink_positions_stride);
  }

  // The columns of the tile that are sinks; slot[i]: the sink slot of column i, or -1.
  uint64_t find_sinks(int64_t b, int64_t first, int n, int16_t* slot) const {
    uint64_t bits = 0;
    if (a.sink_positions == nullptr) return bits;
    const int32_t* positions = sink_positions(b);
    std::memset(slot, 0xff, sizeof(int16_t) * kTile);
    for (int64_t s = 0; s < a.num_sinks; ++s) {
      int64_t i = positions[s] - first;
      if (positions[s] < 0 || i < 0 || i >= n) continue;
      slot[i] = int16_t(s);
      bits |= uint64_t(1) << i;
    }
    return bits;
  }

  void merge(int64_t b, int64_t h) {
    const int64_t splits = splits_of(b), item = first_of(b) + h * splits;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = h * q_per_kv + row / a.q_len,
                    out = (b * a.num_heads + head) * a.q_len + row % a.q_len;
      const int64_t first = item * rows + row;
      for (int64_t s = merged[chunks * (b * a.num_kv_heads + h) + row / kMaxRows]; s < splits; ++s)
        merge_row(first, states[first + s * rows], sums + (first + s * rows) * v_dim);
      SoftmaxState& total = states[first];
      float* sum = sums + first * v_dim;
      if (a.values.rotate) rotate(sum, v_dim);
      if (a.s_aux) {  // a learned sink: one more score, without a value
        SoftmaxState sink;
        sink.max = a.s_aux[head];
        sink.sum = 1.0f;
        scale_row(sum, v_dim, total.merge(sink).ours);
      }
      const Vec norm(total.finish());
      T* output = (T*)a.output + out * v_dim;
      for (int c = 0; c < v_dim; c += Vec::kWidth) (Vec::load(sum + c) * norm).store(output + c);
      a.logsumexp[out] = total.logsumexp();
    }
  }
};

inline bool decode_attention(const KvquantAttention& a, KeyMethod keys, ValueMethod values) {
  if (a.dtype == kFloat32) return DecodeAttention<float>(a, keys, values).run();
  if (a.dtype == kFloat16) return DecodeAttention<Half>(a, keys, values).run();
  return DecodeAttention<BFloat16>(a, keys, values).run();
}

// The attention operator of one instruction set, whose methods the template arguments choose.
template <KeyMethod (*key_method)(const KvquantSide&, int64_t dtype),
          ValueMethod (*value_method)(const KvquantSide&, int64_t dtype)>
bool attend(const KvquantAttention& a) {
  return decode_attention(a, key_method(a.keys, a.dtype), value_method(a.values, a.dtype));
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
