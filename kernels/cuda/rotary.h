// Rotary keys of latent attention: a second part of every key, in storage of its own.
//
//   score of a column = query . latent + rotary query . rotary key
//
// A Pass over latents has one of these parts and calls it at each stage of its pipeline: the rows of
// a tile lie behind those of keys and values in the same slot, and scores are added before the
// softmax. It has its own codec, scales and queries. What a row of queries reads from exact copies is
// the same of both parts; the host sees to that, since both then have blocks of the same length.
//
//   KVQUANT_R_HEAD_DIM                    channels of rotary keys; 0 or not defined: there are none
//   KVQUANT_R_FORMAT, .._GRID, .._GROUP, .._ROTATE   as of the keys (specialisation.h)
//
// Without rotary keys the part is empty, and so are its functions.
#pragma once

#include "cuda/partials.h"
#include "cuda/queries.h"
#include "cuda/scales.h"
#include "cuda/tiles.h"

#ifndef KVQUANT_R_HEAD_DIM
#define KVQUANT_R_HEAD_DIM 0
#define KVQUANT_R_FORMAT kDense
#define KVQUANT_R_GRID kTokenGrid
#define KVQUANT_R_GROUP 0
#define KVQUANT_R_ROTATE 0
#endif

namespace kvquant {

constexpr int kRotaryDim = KVQUANT_R_HEAD_DIM;
constexpr bool kHasRotary = kRotaryDim > 0;
static_assert(!kHasRotary || (is_head_dim(kRotaryDim) && kRotaryDim <= 256),
              "KVQUANT_R_HEAD_DIM: a multiple of 16 up to 256");
static_assert(!kHasRotary || kRows == 16, "KVQUANT_ROWS: 16 with rotary keys");
static_assert(!kHasRotary || !kIsFloat32, "KVQUANT_DTYPE: FP16 or BF16 with rotary keys");
static_assert(!kHasRotary || !kPaged, "KVQUANT_PAGE_LENGTH: 0 with rotary keys");

using StoredRotary =
    RowForm<CodecOf<KVQUANT_R_FORMAT, KVQUANT_R_GRID, kRotaryDim>::Type,
            KVQUANT_R_GRID == kChannelGrid && KVQUANT_R_FORMAT != kDense,
            KVQUANT_R_FORMAT == kDense ? 0 : KVQUANT_R_GROUP, KVQUANT_R_ROTATE != 0>;
using CopiedRotary = RowForm<Dense16<kRotaryDim, kIsBFloat16>, false, 0, false>;
static_assert(!kHasRotary ||
                  (StoredRotary::kScaled == StoredKeys::kScaled &&
                   StoredRotary::kChannelGrid == StoredKeys::kChannelGrid &&
                   (!StoredKeys::kChannelGrid || StoredRotary::kGroup == StoredKeys::kGroup)),
              "KVQUANT_R_GRID, KVQUANT_R_GROUP: rotary keys have blocks as long as those of keys");
static_assert(
    !kHasRotary || (!kHasCopiedKeys && !kHasCopiedValues),
    "KVQUANT_V_GRID, KVQUANT_V_GROUP: beside rotary keys, values have the blocks of keys");

// kCopied: rows come from exact copies, and the columns are a list.
template <bool kCopied, int kTile, int kStages, int kWarps>
struct RotaryKeys {
  using S = typename Choose<kCopied, CopiedRotary, StoredRotary>::Type;
  using K = typename S::Codec;
  using Rows = typename Choose<kCopied, Copies, StoredRows>::Type;
  using RowTile = Tile<K, kTile>;
  using Scales = TokenScales<S, kTile>;
  using Lanes = Layout<kRows>;
  static constexpr int kEights = kTile / 8, kProducts = kTile / Lanes::kColumns;
  static constexpr int kGroups = larger_of(S::kGroups, 1);
  static constexpr int kSlot = RowTile::kBytes;  // in each slot of the pass
  // In memory of its own: queries, then of each warp the scales of a tile and the headers of blocks.
  static constexpr int kScalesAt = Queries<S>::kBytes;
  static constexpr int kHeadersAt = kScalesAt + kWarps * Scales::kBytes;
  static constexpr int kBytes = kHeadersAt + kStages * kWarps * kHeaderBytes<S>;

  const Place& p;
  const SharedPtr<uint8_t> memory;
  const Queries<S> queries;
  const Rows rows;
  Scales scales;
  const uint8_t* next = nullptr;  // as Pass::next_keys
  float factor[2];

  KVQUANT_DEVICE RotaryKeys(const Place& p, SharedPtr<uint8_t> memory)
      : p(p),
        memory(memory),
        queries(memory),
        rows(rows_of(p)),
        scales(p.a.rotary.side, p, memory + (kScalesAt + warp_index() * Scales::kBytes)) {}

  KVQUANT_DEVICE SharedPtr<uint8_t> header(int column) const {
    const int block = column / larger_of(S::kGroup, 1);
    return memory + (kHeadersAt + (block % kStages * kWarps + warp_index()) * kHeaderBytes<S>);
  }

  // Entry `first` of the columns is the first one of this warp.
  template <class TheColumns>
  KVQUANT_DEVICE void begin(const TheColumns& columns, int first) {
    if constexpr (!kCopied) next = RowTile::place(rows, columns.begin + first);
  }
  KVQUANT_DEVICE void prepare() const {
    queries.template prepare<kWarps>(p, {p.a.rotary.query, p.a.rotary.query_stride});
  }
  // When the queries are complete.
  KVQUANT_DEVICE void take_factors() {
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = queries.factors[Lanes::row(r)];
  }
  // Starts the copy of the tile that begins with entry `first`; within the group of the pass.
  template <class TheColumns>
  KVQUANT_DEVICE void issue(SharedPtr<uint8_t> to, const TheColumns& columns, int first,
                            bool is_first) {
    if constexpr (kCopied) {
      RowTile::copy_list(to, rows, columns, first);
    } else {
      RowTile::copy(to, next, columns.count - first);
      next += RowTile::kTileBytes;
    }
    if constexpr (S::kChannelGrid) {
      const int column = columns.begin + first;
      if (is_first || column % S::kGroup == 0) {
        const KvquantSide& side = p.a.rotary.side;
        copy_header<S>(
            p, side,
            reinterpret_cast<const uint8_t*>(p.of_column(side.scale, side.scale_stride, 0)),
            column / S::kGroup, header(column));
      }
    }
  }
  template <class TheColumns>
  KVQUANT_DEVICE void fetch(const TheColumns& columns, int first) {
    scales.fetch(columns, first);
  }
  KVQUANT_DEVICE void store(uint32_t bits) const { scales.store(bits); }
  KVQUANT_DEVICE void order(int column) const {
    if constexpr (S::kChannelGrid) order_header<S>(shared_cast<Words4>(header(column)));
  }

  // x[m]: the scores of product m (layout.h), in units of log2, to which those of the rotary keys of
  // a tile are added. column: the tile's first.
  template <bool kPlain>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t> tile, int column, float (&x)[kProducts][4]) const {
    using RowChunks = Chunks<K, RowTile>;
    constexpr int kSteps = K::kPairs / 2;
    ZeroPoints<K> zero = {};
    float sum[kProducts][4];
    begin_group(0, sum);
#pragma unroll
    for (int chunk = 0; chunk < kChunks<K>; chunk += RowChunks::kAtOnce) {
      RowChunks chunks;
      chunks.template load<false>(tile, chunk);
#pragma unroll
      for (int i = 0; i < RowChunks::kSplits; ++i) {
        uint32_t pairs[RowChunks::kPairs][kEights];
        chunks.template split<K, kPlain>(i, pairs);
#pragma unroll
        for (int s = 0; s < RowChunks::kPairs / 2; ++s) {
          const int step = RowChunks::first_pair(chunk, i) / 2 + s;
          if (step >= kSteps) continue;
          uint32_t q[Lanes::kQueryWords];
          queries.fragment(step, q);
          if constexpr (S::kChannelGrid) to_block<S>(header(column), step, q, zero);
#pragma unroll
          for (int m = 0; m < kProducts; ++m) {
            Lanes::template add_scores<K>(sum[m], q, pairs[2 * s], pairs[2 * s + 1], m);
          }
          const int group = S::kTokenScaled ? K::channel(2 * step, 0) / larger_of(S::kGroup, 1) : 0;
          const bool last =
              step + 1 == kSteps ||
              (S::kTokenScaled && K::channel(2 * step + 2, 0) / larger_of(S::kGroup, 1) != group);
          if (!last) continue;
#pragma unroll
          for (int m = 0; m < kProducts; ++m) {
            Floats2 scale = {1.0f, 1.0f};
            if constexpr (S::kTokenScaled) scale = scales.two_columns(group, m);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float one = sum[m][e];
              if constexpr (S::kHasZeroPoint) one += of_zero_points<K>(zero, e);
              x[m][e] +=
                  one * ((Lanes::column_of(e) ? scale.y : scale.x) * factor[Lanes::row_of(e)]);
            }
          }
          if (group + 1 < kGroups) begin_group(group + 1, sum);
        }
      }
    }
  }

 private:
  static KVQUANT_DEVICE Rows rows_of(const Place& p) {
    if constexpr (kCopied) {
      return Copies::of<StoredRotary>(p.a.rotary.side, p);
    } else {
      return StoredRows::of<S>(p.a.rotary.side, p);
    }
  }
  KVQUANT_DEVICE void begin_group(int group, float (&sum)[kProducts][4]) const {
    float start[2] = {0.0f, 0.0f};
    if constexpr (Queries<S>::kHasOffset) {
#pragma unroll
      for (int r = 0; r < 2; ++r) start[r] = queries.sums[group * kRows + Lanes::row(r)];
    }
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][e] = start[Lanes::row_of(e)];
    }
  }
};

struct NoRotary {
  static constexpr int kSlot = 0, kBytes = 0;
  KVQUANT_DEVICE NoRotary(const Place&, SharedPtr<uint8_t>) {}
  template <class TheColumns>
  KVQUANT_DEVICE void begin(const TheColumns&, int) {}
  KVQUANT_DEVICE void prepare() const {}
  KVQUANT_DEVICE void take_factors() {}
  template <class TheColumns>
  KVQUANT_DEVICE void issue(SharedPtr<uint8_t>, const TheColumns&, int, bool) {}
  template <class TheColumns>
  KVQUANT_DEVICE void fetch(const TheColumns&, int) {}
  KVQUANT_DEVICE void store(uint32_t) const {}
  KVQUANT_DEVICE void order(int) const {}
  template <bool kPlain, int kProducts>
  KVQUANT_DEVICE void add(SharedPtr<uint8_t>, int, float (&)[kProducts][4]) const {}
};

template <bool kCopied, int kTile, int kStages, int kWarps, bool kSome = kHasRotary>
struct RotaryPart {
  using Type = RotaryKeys<kCopied, kTile, kStages, kWarps>;
};
template <bool kCopied, int kTile, int kStages, int kWarps>
struct RotaryPart<kCopied, kTile, kStages, kWarps, false> {
  using Type = NoRotary;
};

}  // namespace kvquant
