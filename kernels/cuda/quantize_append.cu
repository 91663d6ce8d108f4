// Writes new tokens into the storage of keys and values: rotates, quantizes and packs them,
// completes blocks of the channel grid, fills the ring and the sinks. A decode step takes one launch, as a
// prompt does.
//
//   grid    (x, 2 * num_kv_heads, batch) for any x, because a block takes every x-th span; y: the
//           heads of the keys, then those of the values
//   span    token grid and dense: kRows tokens; channel grid: one block, complete or not
//   thread  one or two octets of a row (octet.h); a block of threads takes Row::kAtOnce rows at a
//           time
//
//   appends  null; or int64 `[2]`, and the kernel counts what it appends, so that a step needs no
//            other kernel for that: it raises *a.length by the new tokens, and appends[1] by 1. The
//            last block to have read the length does; appends[0] counts the blocks, and is 0 before
//            and afterwards.
//
// The bytes are those of hf_kvquant/quantization.py, so products and sums must not be contracted
// when this is compiled. Specialised by macros:
//   KVQUANT_DTYPE                        KvquantDtype of the tokens
//   KVQUANT_HEAD_DIM, KVQUANT_V_HEAD_DIM
//   KVQUANT_K_FORMAT, KVQUANT_K_GRID, KVQUANT_K_GROUP (KvquantSide::group_length), KVQUANT_K_ROTATE
//   KVQUANT_V_FORMAT, KVQUANT_V_GRID, KVQUANT_V_GROUP, KVQUANT_V_ROTATE
//   KVQUANT_K_FEEDBACK, KVQUANT_V_FEEDBACK (feedback.h; not defined: 0)
//   KVQUANT_PAGE_LENGTH (pages.h)
#include "cuda/feedback.h"
#include "cuda/pages.h"

#ifndef KVQUANT_K_FEEDBACK
#define KVQUANT_K_FEEDBACK 0
#endif
#ifndef KVQUANT_V_FEEDBACK
#define KVQUANT_V_FEEDBACK 0
#endif

namespace kvquant {

template <int kHeadDim_, int kFormat_, int kGrid_, int kGroup_, bool kRotate_, bool kFeedback_>
struct AppendSpec {
  static constexpr int kHeadDim = kHeadDim_, kFormat = kFormat_, kGrid = kGrid_, kGroup = kGroup_;
  static constexpr int kBits = code_bits(kFormat);
  static constexpr bool kRotate = kRotate_, kFeedback = kFeedback_;
  static constexpr bool kBlocks = kGrid == kChannelGrid && kFormat != kDense;
  static_assert(page_holds(kBlocks ? kGroup : 1),
                "KVQUANT_PAGE_LENGTH: whole blocks of the channel grid");
  static_assert(kBlocks || !kFeedback, "feedback: on the channel grid");
};

// Blocks of threads run at the same time. No byte that one of them writes is touched by another,
// except in sink_positions: a free slot may be written meanwhile, with a value that counts as free
// too.
template <class S>
struct Append {
  using Tokens = Octets<KVQUANT_DTYPE, S::kHeadDim>;
  using R = Row<S::kHeadDim>;
  static constexpr int kParts = R::kPerLane;
  static constexpr int kRowBytes = S::kHeadDim / 8 * Tokens::One::kBytes;  // of an exact copy
  static constexpr int kLoads = 4 / kParts;  // rows in flight per thread
  static constexpr int kRows = kLoads * R::kAtOnce;
  static constexpr int kSteps = S::kGroup / R::kAtOnce, kAhead = kSteps < kLoads ? kSteps : kLoads;

  // A block of the channel grid, as feedback sees it.
  struct Block {
    const Append& append;
    int base;

    KVQUANT_DEVICE bool is_padding(int t) const { return append.is_padding(base + t); }
    KVQUANT_DEVICE void store_scale(int channel, uint16_t scale, uint16_t zero_point) const {
      const KvquantSide& side = append.x.side;
      global_store(append.template scale_row<S::kGroup, S::kHeadDim>(side.scale, base) + channel,
                   scale);
      if (side.zero_point == nullptr) return;
      global_store(
          append.template scale_row<S::kGroup, S::kHeadDim>(side.zero_point, base) + channel,
          zero_point);
    }
  };

  const KvquantAppend& a;
  const KvquantNewTokens& x;
  const int batch, head;
  const int start, end;
  // The ring slots of columns kept .. start are written by the block that completes those columns.
  int kept;
  int bad = 0;  // rows of this warp that hold a NaN or infinity

  KVQUANT_DEVICE Append(const KvquantAppend& a, const KvquantNewTokens& x, int head, int64_t start)
      : a(a),
        x(x),
        batch(block_index_z()),
        head(head),
        start(int(start)),
        end(int(start + x.n)),
        kept(int(start)) {}

  KVQUANT_DEVICE void run() {
    if (end == start) return;
    if constexpr (S::kBlocks) {
      const int first = start / S::kGroup;
      if ((first + 1) * S::kGroup <= end) kept = first * S::kGroup;
      for (int block = first + block_index_x(); block * S::kGroup < end; block += grid_size_x()) {
        write_block(block * S::kGroup);
      }
    } else {
      for (int span = block_index_x(); span * kRows < end - start; span += grid_size_x()) {
        write_tokens(start + span * kRows);
      }
    }
    if (bad && lane_index() == 0) atomic_add(a.faults, int64_t(bad));
    if (block_index_x() == 0 && warp_index() == KVQUANT_THREADS / 32 - 1) write_sinks();
  }

  // -- where rows are -----------------------------------------------------------------------------

  // The first byte of this head in the storage of a column, and in that of exact copies.
  KVQUANT_DEVICE uint8_t* at(uint8_t* base, const int64_t (&stride)[2], int column) const {
    return base + storage_of(a.pages, batch, column) * stride[0] + head * stride[1];
  }
  KVQUANT_DEVICE uint8_t* exact_at(uint8_t* base, const int64_t (&stride)[2]) const {
    return base + exact_of(a.pages, batch) * stride[0] + head * stride[1];
  }
  KVQUANT_DEVICE const uint8_t* new_row(int t) const {
    return x.x + batch * x.x_stride[0] + head * x.x_stride[1] + (t - start) * x.x_stride[2];
  }
  KVQUANT_DEVICE uint8_t* ring_row(int t) const {
    const int slot = t % int(x.side.ring_length);
    return exact_at(x.side.recent, x.side.recent_stride) + int64_t(slot) * kRowBytes;
  }
  KVQUANT_DEVICE uint8_t* code_row(int t) const {
    constexpr int kBytes = S::kFormat == kDense ? kRowBytes : S::kHeadDim * S::kBits / 8;
    return at(x.side.data, x.side.data_stride, t) + int64_t(in_storage(t)) * kBytes;
  }
  // The scales or zero points of a token, or of a block of kColumns tokens.
  template <int kColumns, int kPerRow>
  KVQUANT_DEVICE uint16_t* scale_row(uint16_t* base, int t) const {
    uint8_t* first = at(reinterpret_cast<uint8_t*>(base), x.side.scale_stride, t);
    return reinterpret_cast<uint16_t*>(first) + int64_t(in_storage(t) / kColumns) * kPerRow;
  }
  KVQUANT_DEVICE bool is_padding(int t) const {
    return a.padding && t < a.padding_length &&
           global_load(a.padding + batch * a.padding_stride + t);
  }

  // -- tokens -------------------------------------------------------------------------------------

  // Counts the rows of this warp that are not finite; every lane must call this.
  KVQUANT_DEVICE void count_bad(bool finite) {
    const uint32_t lanes = warp_ballot(!finite);
    if (lanes == 0) return;
#pragma unroll
    for (int first = 0; first < 32; first += R::kLanes) {
      bad += (lanes >> first & 0xffffffffu >> (32 - R::kLanes)) != 0;
    }
  }

  // The ring keeps the last ring_length columns.
  KVQUANT_DEVICE void write_recent(int t, const Tokens& octets) const {
    const int length = int(x.side.ring_length);
    if (x.side.recent == nullptr || t < end - length) return;
    if (kept < start && (t - kept) % length < start - kept) return;  // see write_block
    octets.store(ring_row(t));
  }

  KVQUANT_DEVICE void write_tokens(int first) {
    Tokens rows[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int t = first + i * R::kAtOnce + R::index();
      if (t < end && !R::idle()) {
        rows[i].load_once(new_row(t));
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * R::kAtOnce >= end) break;
      const int t = first + i * R::kAtOnce + R::index();
      write_token(t, rows[i], t < end && !R::idle());
    }
  }

  // Every lane must call this; `mine`: the lane holds octets of a row that exists.
  KVQUANT_DEVICE void write_token(int t, const Tokens& octets, bool mine) {
    float y[kParts][8];
    octets.unpack(y);
    count_bad(is_finite(largest_magnitude(y)));
    if (mine) write_recent(t, octets);
    if constexpr (S::kFormat == kDense) {
      if (mine) octets.store(code_row(t));
    } else {
      using Format = typename FormatOf<S::kFormat>::Token;
      constexpr int kGroupOctets = S::kGroup / 8, kGroups = S::kHeadDim / S::kGroup;
      if (S::kRotate) rotate<S::kHeadDim>(y);
      // A group lies in one octet of each lane, or in all of them.
      constexpr bool kOneGroup = kGroups == 1;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const float mine_of_group = kOneGroup ? largest_magnitude(y) : largest_magnitude(y[i]);
        const uint16_t scale =
            token_scale<Format>(group_max<S::kHeadDim, S::kGroup>(mine_of_group));
        if (mine && R::octet(i) % kGroupOctets == 0) {
          global_store(scale_row<1, kGroups>(x.side.scale, t) + R::octet(i) / kGroupOctets, scale);
        }
        store_codes<S::kBits, S::kHeadDim>(token_codes<Format>(y[i], scale), code_row(t), mine, i);
      }
    }
  }

  // -- blocks of the channel grid -----------------------------------------------------------------

  // Writes the new columns of the block at `base` to the ring and, if the block is complete,
  // quantizes it. Without feedback that reads its rows twice: for the statistics, then (most likely
  // from the L2 cache) for the codes.
  KVQUANT_DEVICE void write_block(int base) {
    using Format = typename FormatOf<S::kFormat>::Channel;
    static_assert(S::kGroup % R::kAtOnce == 0, "a block is read in whole steps");
    const bool complete = base + S::kGroup <= end;
    Channel<Format> channels[kParts][8];
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kAhead) {
      const int first = base + step * R::kAtOnce;
      if (!complete && (first >= end || first + kAhead * R::kAtOnce <= start)) continue;
      Tokens rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        load_column(rows[i], first + i * R::kAtOnce + R::index(), complete);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int t = first + i * R::kAtOnce + R::index();
        const bool is_new = t >= start && t < end && !R::idle();
        float y[kParts][8];
        rows[i].unpack(y);
        const bool finite = is_finite(largest_magnitude(y));
        count_bad(finite || !is_new);
        if (is_new) write_recent(t, rows[i]);
        if constexpr (S::kFeedback) {
          if (complete && !R::idle()) feedback<Format>().put(t - base, y);
        } else {
          if (!complete || is_padding(t)) continue;
#pragma unroll
          for (int j = 0; j < 8 * kParts; ++j) {
            const float one = y[j / 8][j % 8];
            if (finite || is_finite(fabsf(one))) channels[j / 8][j % 8].count(one);
          }
        }
      }
    }
    if (!complete) return;
    if constexpr (S::kFeedback) {
      const float* factors = x.factors + int64_t(head) * S::kHeadDim * S::kHeadDim;
      feedback<Format>().round(factors, Block{*this, base});
      write_rounded<Format>(base);
    } else {
      write_codes(channels, base);
    }
    // Now the next block may use the same shared memory, and the ring slots of the earlier columns
    // may be overwritten.
    block_barrier();
    if (base < start) write_kept_slots();
  }

  // The codes of a block from its statistics.
  template <class Format>
  KVQUANT_DEVICE void write_codes(Channel<Format> (&channels)[kParts][8], int base) {
    float zero[kParts][8], r[kParts][8];
    merge(channels);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      write_scales(channels[part], part, base, zero[part], r[part]);
    }
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kAhead) {
      const int first = base + step * R::kAtOnce;
      Tokens rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        load_column(rows[i], first + i * R::kAtOnce + R::index(), true);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float y[kParts][8];
        rows[i].unpack(y);
        uint8_t* row = code_row(first + i * R::kAtOnce + R::index());
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            y[part][j] = Channel<Format>::code(y[part][j], zero[part][j], r[part][j]);
          }
          store_codes<S::kBits, S::kHeadDim>(encode<Format>(y[part]), row, !R::idle(), part);
        }
      }
    }
  }

  // The rows of a block that has feedback, in shared memory.
  template <class Format>
  static KVQUANT_DEVICE Feedback<Format, S::kHeadDim, S::kGroup> feedback() {
    KVQUANT_DYNAMIC_SHARED(float, memory);
    return {memory};
  }
  // The codes of a block that feedback has rounded.
  template <class Format>
  KVQUANT_DEVICE void write_rounded(int base) const {
#pragma unroll 1
    for (int first = 0; first < S::kGroup; first += R::kAtOnce) {
      const int t = first + R::index();
      float y[kParts][8] = {};
      if (!R::idle()) feedback<Format>().get(t, y);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        store_codes<S::kBits, S::kHeadDim>(encode<Format>(y[part]), code_row(base + t), !R::idle(),
                                           part);
      }
    }
  }

  // Columns before `start` come from the ring, and only if `early`.
  KVQUANT_DEVICE void load_column(Tokens& octets, int t, bool early) const {
    if (R::idle() || t >= end || (t < start && !early)) return;
    octets.load(t < start ? ring_row(t) : new_row(t));
  }

  // Merges the statistics of all threads of the block.
  template <class Format>
  KVQUANT_DEVICE void merge(Channel<Format> (&channels)[kParts][8]) const {
    constexpr int kWarps = KVQUANT_THREADS / 32;
    KVQUANT_SHARED(float, lows, kWarps* S::kHeadDim);
    KVQUANT_SHARED(float, highs, kWarps* S::kHeadDim);
    const int place = warp_index() * S::kHeadDim;
#pragma unroll
    for (int j = 0; j < 8 * kParts; ++j) {
      Channel<Format>& mine = channels[j / 8][j % 8];
#pragma unroll
      for (int mask = R::kLanes; mask < 32; mask *= 2) {
        const float low = shuffle_xor(mine.low, mask);
        const float high = shuffle_xor(mine.high, mask);
        mine.merge(low, high);
      }
      if (lane_index() < R::kOctets) {
        const int channel = place + 8 * R::octet(j / 8) + j % 8;
        lows[channel] = mine.low;
        highs[channel] = mine.high;
      }
    }
    block_barrier();
    if (R::idle()) return;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
      for (int j = 0; j < 8 * kParts; ++j) {
        const int channel = warp * S::kHeadDim + 8 * R::octet(j / 8) + j % 8;
        const float low = lows[channel], high = highs[channel];
        channels[j / 8][j % 8].merge(low, high);
      }
    }
  }

  // Stores the scales and zero points of octet `part` of the block at `base`; returns zero points and
  // reciprocals of scales.
  template <class Format>
  KVQUANT_DEVICE void write_scales(const Channel<Format> (&channels)[8], int part, int base,
                                   float (&zero)[8], float (&r)[8]) const {
    constexpr bool kSymmetric = Channel<Format>::kSymmetric;
    uint32_t zeros[4] = {}, scales[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint16_t z = kSymmetric ? 0 : channels[j].zero_point();
      zero[j] = half_of(z);
      const uint16_t s = channels[j].scale(zero[j]);
      r[j] = Channel<Format>::reciprocal(s);
      zeros[j / 2] |= uint32_t(z) << 16 * (j % 2);
      scales[j / 2] |= uint32_t(s) << 16 * (j % 2);
    }
    if (R::index() != 0 || R::idle()) return;
    const int first = 8 * R::octet(part);
    store_16(scale_row<S::kGroup, S::kHeadDim>(x.side.scale, base) + first,
             {scales[0], scales[1], scales[2], scales[3]});
    if (!kSymmetric) {
      store_16(scale_row<S::kGroup, S::kHeadDim>(x.side.zero_point, base) + first,
               {zeros[0], zeros[1], zeros[2], zeros[3]});
    }
  }

  // A long append may wrap around the ring, onto columns that its first block still needs. Only the
  // block of threads that has read them writes these slots, here.
  KVQUANT_DEVICE void write_kept_slots() const {
    const int length = int(x.side.ring_length);
    for (int early = kept + R::index(); early < start; early += R::kAtOnce) {
      const int t = early + (end - 1 - early) / length * length;  // the last column of this slot
      if (t < start || R::idle()) continue;
      Tokens octets;
      octets.load(new_row(t));
      octets.store(ring_row(t));
    }
  }

  // -- sinks --------------------------------------------------------------------------------------

  // One warp copies the first tokens of the batch row that are not padding, while there are free
  // slots. A slot is taken if its column is before `start`. Another block may write the free slots
  // meanwhile, with columns that are not before `start` either, so all blocks count the same.
  KVQUANT_DEVICE void write_sinks() const {
    if (a.num_sinks == 0) return;
    if constexpr (kPaged) return write_first_columns();
    int32_t* positions = reinterpret_cast<int32_t*>(reinterpret_cast<uint8_t*>(a.sink_positions) +
                                                    batch * a.sink_positions_stride);
    const int lane = lane_index(), num_sinks = int(a.num_sinks);
    int slot = 0;
    for (int first = 0; first < num_sinks; first += 32) {
      const int32_t column =
          first + lane < num_sinks ? global_load_relaxed(positions + first + lane) : -1;
      slot += count_bits(warp_ballot(column >= 0 && column < start));
    }
    const bool writes_positions = block_index_y() == 0;
    for (int first = start; first < end && slot < num_sinks; first += 32) {
      const uint32_t tokens = warp_ballot(first + lane < end && !is_padding(first + lane));
      for (int i = 0; i < 32 && slot < num_sinks; ++i) {
        if (!(tokens >> i & 1)) continue;
        if (writes_positions && lane == 0) global_store_relaxed(positions + slot, first + i);
        if (x.side.sink && lane < R::kOctets) {
          Tokens octets;
          octets.load(new_row(first + i));
          octets.store(exact_at(x.side.sink, x.side.sink_stride) + int64_t(slot) * kRowBytes);
        }
        ++slot;
      }
    }
  }

  // With pages, column i is sink i, and there is no padding.
  KVQUANT_DEVICE void write_first_columns() const {
    if (x.side.sink == nullptr || lane_index() >= R::kOctets) return;
    const int past = end < int(a.num_sinks) ? end : int(a.num_sinks);
    for (int t = start; t < past; ++t) {
      Tokens octets;
      octets.load(new_row(t));
      octets.store(exact_at(x.side.sink, x.side.sink_stride) + int64_t(t) * kRowBytes);
    }
  }
};

// All threads of a block call this once they have read the length, `start`.
KVQUANT_DEVICE void count_append(const KvquantAppend& a, int64_t start, int64_t* appends) {
  block_barrier();
  if (thread_index() != 0) return;
  const int64_t blocks = int64_t(grid_size_x()) * grid_size_y() * grid_size_z();
  if (atomic_add_in_order(appends, 1) != blocks - 1) return;
  global_store_relaxed(appends, int64_t(0));
  global_store_relaxed(appends + 1, global_load_relaxed(appends + 1) + 1);
  global_store_relaxed(a.length, start + a.keys.n);
}

using Keys = AppendSpec<KVQUANT_HEAD_DIM, KVQUANT_K_FORMAT, KVQUANT_K_GRID, KVQUANT_K_GROUP,
                        KVQUANT_K_ROTATE != 0, KVQUANT_K_FEEDBACK != 0>;
using Values = AppendSpec<KVQUANT_V_HEAD_DIM, KVQUANT_V_FORMAT, KVQUANT_V_GRID, KVQUANT_V_GROUP,
                          KVQUANT_V_ROTATE != 0, KVQUANT_V_FEEDBACK != 0>;

// The shared memory that a side needs.
template <class S>
KVQUANT_FN constexpr int bytes_of() {
  if constexpr (S::kFeedback) {
    return Feedback<typename FormatOf<S::kFormat>::Channel, S::kHeadDim, S::kGroup>::kBytes;
  }
  return 0;
}
template <class S>
constexpr bool kLongBlocks = S::kFeedback && S::kGroup > 64;
constexpr int kKeyBytes = bytes_of<Keys>(), kValueBytes = bytes_of<Values>();
constexpr int kSharedBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
// For how many blocks of threads an SM has to have registers. There is shared memory for few that
// have feedback in wide heads, and long blocks take more registers.
constexpr int kBlocksOfSm =
    kLongBlocks<Keys> || kLongBlocks<Values> || kSharedBytes > 48 << 10 ? 3 : 5;

}  // namespace kvquant

KVQUANT_KERNEL(quantize_append_kernel, KVQUANT_THREADS, kvquant::kBlocksOfSm, kvquant::kSharedBytes,
               KVQUANT_ARGUMENT KvquantAppend a, int64_t* appends) {
  using namespace kvquant;
  let_next_grid_start();
  wait_for_grids();
  const int64_t* const length = kPaged ? a.pages.lengths + block_index_z() : a.length;
  const int64_t start = length ? global_load_relaxed(length) : a.start;
  if (appends) count_append(a, start, appends);
  // The host has checked that pages have room.
  if (!kPaged &&
      (start + a.keys.n > a.keys.side.capacity || start + a.values.n > a.values.side.capacity)) {
    const bool first = block_index_x() + block_index_y() + block_index_z() + thread_index() == 0;
    if (first) atomic_add(a.faults + 1, a.keys.n);
    return;
  }
  const int heads = int(a.num_kv_heads), y = block_index_y();
  if (y < heads) {
    Append<Keys>(a, a.keys, y, start).run();
  } else {
    Append<Values>(a, a.values, y - heads, start).run();
  }
}
