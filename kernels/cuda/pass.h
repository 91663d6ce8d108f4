// One pass of a block over its columns, written once for every kind of column and every codec.
//
//   warp w        consecutive tiles, with buffers and a softmax of its own: the block has no
//                 barrier between the first tile and the last
//
//     tile        0        1        2        3                    kStages = 2
//     copies      0 1      2        3                             cp.async, 16 bytes a lane
//     scales      0   1      2        3                           a register ahead
//     scores        0        1        2        3                  MMA: queries and keys (layout.h)
//     softmax        0        1        2        3
//     values          0        1        2        3                MMA: weights and values
//
//   block         adds up the warps' results in a tree of fixed shape, writes one partial result
//
// Codes are never multiplied by their scales. On the token grid, scores are multiplied by the key's
// scale, and weights by the value's. On the channel grid, queries are multiplied by the scales of a
// block of keys; its zero points are treated as one more key, whose score is added to all of the
// block. Weighted codes of values are summed over the columns of a block, or of a tile where
// registers do not suffice for more, and these sums are multiplied by the scales; zero points are
// multiplied by the sum of the block's weights.
//
// Weights times scales must fit FP16. Scales of values are therefore divided by `reference`, a
// power of two above the largest so far; the sums are kept in the same unit.
//
// Most tiles are plain: every row sees each of their columns, without a bias, a softcap or a copy.
// Which ones is known before the loop, from one load of the mask. The other tiles look again, column
// by column.
//
// Keys of latent attention have a second part, whose scores are added at the same stages (rotary.h).
//
// A hidden column has weight 0, whatever is stored there: its scores and scales are replaced, not
// changed. Codes are finite in every codec. Dense values that are not finite are taken out of the
// product and added one by one (NonFinite).
#pragma once

#include "cuda/float_values.h"
#include "cuda/masks.h"
#include "cuda/non_finite.h"
#include "cuda/partials.h"
#include "cuda/queries.h"
#include "cuda/rotary.h"
#include "cuda/scales.h"
#include "cuda/softmax.h"
#include "cuda/tiles.h"

namespace kvquant {

// kCopied..: rows come from exact copies, and the columns are a list; without them, a range.
template <class Keys, class Values, bool kCopiedKeysHere, bool kCopiedValuesHere, int kTileRows,
          int kNumStages, int kNumWarps>
struct Pass {
  using K = typename Keys::Codec;
  using V = typename Values::Codec;
  using Lanes = Layout<kRows>;
  using KeyTile = Tile<K, kTileRows>;
  using ValueTile = Tile<V, kTileRows, Values::kParts>;
  static constexpr bool kInOrder = !kCopiedKeysHere && !kCopiedValuesHere;
  static constexpr int kTile = kTileRows, kStages = kNumStages, kWarps = kNumWarps;
  static constexpr int kEights = kTile / 8, kProducts = kTile / Lanes::kColumns;
  static constexpr int kSums = V::kPairs / Lanes::kPairsOfProduct;
  // The offset of values is subtracted once per row, times the sum of weights; with several groups,
  // from every code (kCentred).
  static constexpr bool kHasOffset = Values::kTokenScaled && V::kOffset != 0.0f;
  using KeyScales = TokenScales<Keys, kTile>;
  using ValueScales = TokenScales<Values, kTile>;
  using Rotary = typename RotaryPart<kCopiedKeysHere, kTile, kStages, kWarps>::Type;
  static constexpr int kTerms = kTermsOf<K>, kWeightTerms = kTermsOf<V>;
  using Query = uint32_t[kTerms][Lanes::kQueryWords];
  using Scores = float[kTerms][kProducts][4];
  using Weights = uint32_t[kWeightTerms][kTile / 16][Lanes::kQueryWords];
  static constexpr bool kCentred = kHasOffset && ValueScales::kGroups > 1;
  // Values on the channel grid: `of_block` has the sums of a block until it ends.
  static constexpr bool kSumsBlocks = Values::kChannelGrid && kRows == 8;
  // Sums of a tile are added to those before by float additions. In float32 always: tensor cores
  // cut sums off, and many of these errors in a row would show.
  static constexpr bool kSumsTiles = (Values::kChannelGrid || kIsFloat32) && !kSumsBlocks;
  // Which tiles of a warp are plain is kept in words of kWordTiles bits, kWords of them.
  static constexpr int kMostTiles = kMostColumns / kWarps / kTile;
  static constexpr int kWordTiles = kMostTiles < 512 / kTile ? kMostTiles : 512 / kTile;
  static constexpr int kWords = kInOrder ? kMostTiles / kWordTiles : 0;

  // Shared memory of the block, in bytes from its beginning.
  static constexpr int kRotaryRowsAt = KeyTile::kBytes + ValueTile::kBytes;  // in a slot
  static constexpr int kSlot = kRotaryRowsAt + Rotary::kSlot;
  static constexpr int kTreeBytes = kWarps / 2 * kSums * 512;
  static constexpr int kTilesBytes =
      kStages * kWarps * kSlot > kTreeBytes ? kStages * kWarps * kSlot : kTreeBytes;
  static constexpr int kKeyHeadersAt = kTilesBytes;
  static constexpr int kValueHeadersAt = kKeyHeadersAt + kStages * kWarps * kHeaderBytes<Keys>;
  static constexpr int kRotaryAt = kValueHeadersAt + kStages * kWarps * kHeaderBytes<Values>;
  static constexpr int kQueriesAt = kRotaryAt + Rotary::kBytes;
  static constexpr int kScalesAt = kQueriesAt + Queries<Keys>::kBytes;
  // Of a warp: the scales of a tile, and in the end the state of its rows.
  static constexpr int kScales = larger_of(KeyScales::kBytes + ValueScales::kBytes, kRows * 8);
  static constexpr int kPlainAt = kScalesAt + kWarps * kScales;
  static constexpr int kBytes = kPlainAt + kWarps * kWords * 4;
  static_assert(kMostTiles % kWordTiles == 0, "KVQUANT_SPLIT: whole words of tiles for each warp");

  const Place& p;
  const Columns<!kInOrder>& columns;
  const Mask& mask;
  const SharedPtr<uint8_t> memory;
  const Queries<Keys> queries;
  Rotary rotary;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;

  const uint8_t* const key_scale_rows = kPaged ? nullptr : scale_rows(p.a.keys, 0);

  // Layouts that hold the queries: multiplied by the scales of a block on the channel grid, and
  // what its zero points add to the products of a row.
  Query query[Lanes::kHoldsQueries ? Queries<Keys>::kSteps : 1];
  float zero_points[2] = {0.0f, 0.0f};

  RowsSoftmax softmax;
  float acc[kSums][4] = {};
  float of_block[kSumsBlocks ? kSums : 1][4] = {};
  float weight_sum[4] = {};  // the weights are rounded; with zero points, of the block
  float reference = 0.0f;

  KVQUANT_DEVICE Pass(const Place& p, const Columns<!kInOrder>& columns, const Mask& mask,
                      SharedPtr<uint8_t> memory)
      : p(p),
        columns(columns),
        mask(mask),
        memory(memory),
        queries(memory + kQueriesAt),
        rotary(p, memory + kRotaryAt) {}

  // Where the next tile that is copied lies in memory (Tile::place), if columns are in order.
  const uint8_t *next_keys = nullptr, *next_values = nullptr;

  // The scales of the head, in the storage that has `column`.
  KVQUANT_DEVICE const uint8_t* scale_rows(const KvquantSide& side, int column) const {
    return reinterpret_cast<const uint8_t*>(p.of_column(side.scale, side.scale_stride, column));
  }
  // The slot of the i-th tile of this warp. Unsigned, because a remainder then takes fewer
  // instructions.
  KVQUANT_DEVICE SharedPtr<uint8_t> slot(uint32_t i) const {
    return memory + (warp * kStages + int(i % kStages)) * kSlot;
  }
  KVQUANT_DEVICE SharedPtr<uint8_t> scales(int warp) const {
    return memory + (kScalesAt + warp * kScales);
  }
  // The headers of blocks of the channel grid. There is one for each stage, because each of the
  // tiles in memory may lie in another block.
  template <class S>
  KVQUANT_DEVICE SharedPtr<uint8_t> header(int at, int block) const {
    return memory + (at + (block % kStages * kWarps + warp) * kHeaderBytes<S>);
  }
  KVQUANT_DEVICE SharedPtr<uint8_t> key_header(int block) const {
    return header<Keys>(kKeyHeadersAt, block);
  }
  KVQUANT_DEVICE SharedPtr<uint8_t> value_header(int block) const {
    return header<Values>(kValueHeadersAt, block);
  }

  template <class KeyRows, class ValueRows>
  KVQUANT_DEVICE void run(const KeyRows& key_rows, const ValueRows& value_rows) {
    const int tiles = (columns.count + kTile - 1) / kTile;
    const int of_block = kInOrder ? Splits::columns(p.a, p.kv_len) / kTile : tiles,
              share = (of_block + kWarps - 1) / kWarps;
    const int begin = warp * share, end = begin + share < tiles ? begin + share : tiles;
    KeyScales key_scales(p.a.keys, p, scales(warp));
    ValueScales value_scales(p.a.values, p, scales(warp) + KeyScales::kBytes);

    if constexpr (kInOrder && !kPaged) {
      next_keys = KeyTile::place(key_rows, columns.begin + begin * kTile);
      next_values = ValueTile::place(value_rows, columns.begin + begin * kTile);
    }
    rotary.begin(columns, begin * kTile);
    for (int i = 0; i < kStages - 1; ++i) {
      issue(begin + i, slot(i), begin, end, key_rows, value_rows);
    }
    if (begin < end) {
      key_scales.fetch(columns, begin * kTile);
      rotary.fetch(columns, begin * kTile);
      value_scales.fetch(columns, begin * kTile);
    }
    const auto plain_words = shared_cast<uint32_t>(memory + kPlainAt) + warp * kWords;
    for (int first = begin; kInOrder && first < end; first += kWordTiles) {
      const uint32_t tiles = plain_tiles(first);
      if (lane == 0) plain_words[(first - begin) / kWordTiles] = tiles;
    }
    queries.template prepare<kWarps>(p, {p.a.query, p.a.query_stride});
    rotary.prepare();
    block_barrier();
    rotary.take_factors();

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = queries.factors[Lanes::row(r)];
    if constexpr (Lanes::kHoldsQueries && !Keys::kChannelGrid) take_queries(0);
    int i = begin;
    while (i < end) {
      uint32_t plain = kInOrder ? plain_words[(i - begin) / kWordTiles] : 0u;
      const int last = i + kWordTiles < end ? i + kWordTiles : end;
      for (; i < last; ++i) {
        if constexpr (kStages == 1) issue(i, slot(0), begin, end, key_rows, value_rows);
        cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
        warp_barrier();  // tile i is complete, and tile i - 1 has been read
        if constexpr (kStages > 1) {
          issue(i + kStages - 1, slot(i + kStages - 1 - begin), begin, end, key_rows, value_rows);
        }
        if (kInOrder && (plain & 1u)) {
          attend<true>(i, slot(i - begin), i == begin, i + 1 < end, key_scales, value_scales,
                       factor);
        } else {
          attend<false>(i, slot(i - begin), i == begin, i + 1 < end, key_scales, value_scales,
                        factor);
        }
        if constexpr (Values::kChannelGrid) {
          const int past = columns.begin + (i + 1) * kTile;
          if (past % Values::kGroup == 0 || i + 1 == end) {
            close_block((past - 1) / Values::kGroup);
          }
        }
        if constexpr (kStages == 1) warp_barrier();
        plain >>= 1;
      }
    }
    softmax.finish();
  }

  // Bit i: tile `begin` + i is plain, for kWordTiles tiles.
  KVQUANT_DEVICE uint32_t plain_tiles(int begin) const {
    constexpr int kLoads = kWordTiles * kTile / 32;
    static_assert(kLoads * 32 == kWordTiles * kTile, "whole words of columns");
    if (p.a.softcap != 0.0 || !mask.is_shared) return 0;
    const int from = columns.begin + begin * kTile + lane, past = columns.begin + columns.count,
              end = past < mask.plain_end ? past : mask.plain_end;
    if (p.a.mask_kind == kNoMask && columns.sinks.last < columns.begin + begin * kTile) {
      const int whole = (end - columns.begin) / kTile - begin;
      return whole >= 32 ? ~0u : whole > 0 ? (1u << whole) - 1 : 0u;
    }
    const uint32_t seen = mask.plain<kLoads>(from, end);
    uint32_t tiles = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t word = warp_ballot((seen >> i & 1u) != 0 && !columns.sinks.has(from + 32 * i));
      if constexpr (kTile == 32) {
        tiles |= uint32_t(word == ~0u) << i;
      } else {
        tiles |= (uint32_t((word & 0xffffu) == 0xffffu) | uint32_t(word >> 16 == 0xffffu) << 1)
                 << 2 * i;
      }
    }
    return tiles;
  }

  // Starts the copy of a tile of this warp, in order, to `to`. Every tile commits a group, even an
  // empty one, because the waits count groups.
  template <class KeyRows, class ValueRows>
  KVQUANT_DEVICE void issue(int tile, SharedPtr<uint8_t> to, int begin, int end,
                            const KeyRows& key_rows, const ValueRows& value_rows) {
    if (tile < end) {
      const int left = columns.count - tile * kTile, column = columns.begin + tile * kTile;
      if constexpr (kInOrder && kPaged) {
        // With 16 rows there are no registers in which the places could be kept.
        if (kRows == 16 || tile == begin || column % kPageLength == 0) {
          next_keys = KeyTile::place(key_rows, column);
          next_values = ValueTile::place(value_rows, column);
        }
      }
      if constexpr (!kInOrder) {
        KeyTile::copy_list(to, key_rows, columns, tile * kTile);
        ValueTile::copy_list(to + KeyTile::kBytes, value_rows, columns, tile * kTile);
      } else {
        KeyTile::copy(to, next_keys, left);
        ValueTile::copy(to + KeyTile::kBytes, next_values, left);
      }
      next_keys += KeyTile::kTileBytes;
      next_values += ValueTile::kTileBytes;
      rotary.issue(to + kRotaryRowsAt, columns, tile * kTile, tile == begin);
      if constexpr (Keys::kChannelGrid) {
        if (tile == begin || column % Keys::kGroup == 0) {
          copy_header<Keys>(p, p.a.keys, kPaged ? scale_rows(p.a.keys, column) : key_scale_rows,
                            in_storage(column) / Keys::kGroup, key_header(column / Keys::kGroup));
        }
      }
      if constexpr (Values::kChannelGrid) {
        if (tile == begin || column % Values::kGroup == 0) {
          // Not kept, as that of the keys is: registers are scarcer with values on this grid.
          copy_header<Values>(p, p.a.values, scale_rows(p.a.values, column),
                              in_storage(column) / Values::kGroup,
                              value_header(column / Values::kGroup));
        }
      }
    }
    cp_async_commit();
  }

  // kPlain: the tile is one of plain_tiles(). rows: its slot.
  template <bool kPlain>
  KVQUANT_DEVICE void attend(int tile, SharedPtr<uint8_t> rows, bool is_first, bool has_next,
                             KeyScales& key_scales, ValueScales& value_scales,
                             const float (&factor)[2]) {
    const int first = tile * kTile;
    // One bit per column: set if it is in this tile, and not hidden from all rows.
    const int mine = first + lane % kTile, column = columns.column(mine);
    bool taken = column >= 0;
    if (!kPlain && taken && !columns.is_slot(mine)) taken = !columns.sinks.has(column);
    bool biased = false;
    if (!kPlain && taken) {
      const Seen common = mask.common(column);
      taken = common.seen;
      biased = common.bias != 0.0f;
    }
    const uint32_t all = kTile == 32 ? ~0u : (1u << kTile % 32) - 1,
                   bits = kPlain ? all : warp_ballot(taken) & all;
    const int past = first + kTile < columns.count ? first + kTile : columns.count;
    const bool by_row =
        !kPlain && (!kInOrder || !mask.is_shared || columns.begin + past > mask.plain_end ||
                    warp_any(taken && biased));
    const bool bigger = value_scales.exceed(bits, reference);
    key_scales.store(bits);
    rotary.store(bits);
    if (warp_any(bigger)) raise_reference(value_scales.largest(bits));
    value_scales.store(bits, reference);
    if (has_next) {
      key_scales.fetch(columns, first + kTile);
      rotary.fetch(columns, first + kTile);
      value_scales.fetch(columns, first + kTile);
    }
    const int at = columns.begin + first;
    const bool new_block = Keys::kChannelGrid && (is_first || at % Keys::kGroup == 0);
    if constexpr (Keys::kChannelGrid) {
      if (new_block) {
        order_header<Keys>(shared_cast<Words4>(key_header(at / Keys::kGroup)));
        rotary.order(at);
      }
    }
    warp_barrier();  // the scales are written
    if constexpr (Lanes::kHoldsQueries) {
      if (new_block) take_queries(at / Keys::kGroup);
    }
    if (bits == 0) return;

    float x[kProducts][4];
    score<kPlain>(rows, at, key_scales, x);
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][e] *= factor[Lanes::row_of(e)];
    }
    rotary.template add<kPlain>(rows + kRotaryRowsAt, at, x);
    if (!kPlain && p.a.softcap != 0.0) {
      const ScoreRule rule(p.a);
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][e] = rule(x[m][e]);
      }
    }
    const bool plain = kPlain || (bits == all && !by_row);
    if (!plain) hide(bits, by_row, column, first, x);

    float largest[2] = {-infinity(), -infinity()}, rescale[2];
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& of_row = largest[Lanes::row_of(e)];
        of_row = fmaxf(of_row, x[m][e]);
      }
    }
    if (softmax.update(largest, rescale)) rescale_all(rescale[0], rescale[1]);
    const float base[2] = {softmax.base(0), softmax.base(1)};
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = Lanes::row_of(e);
        // A hidden column has weight -0, which differs from a weight that underflowed.
        const bool hidden = !plain && x[m][e] == -infinity();
        x[m][e] = hidden ? -0.0f : exp2_approx(x[m][e] - base[r]);
        softmax.sum[r] += x[m][e];
      }
    }
    weigh<kPlain>(rows + KeyTile::kBytes, at, value_scales, plain, x);
  }

  // x[m]: the scores of product m (layout.h), before the factor of the query.
  template <bool kPlain>
  KVQUANT_DEVICE void score(SharedPtr<uint8_t> tile, int column, const KeyScales& scales,
                            float (&x)[kProducts][4]) const {
    using KeyChunks = Chunks<K, KeyTile>;
    constexpr int kGroups = KeyScales::kGroups, kSteps = kStepsOf<K>;
    ZeroPoints<K> zero[kTerms] = {};
    Scores sum;
    begin_group(0, sum);
    const int block = Keys::kChannelGrid ? column / Keys::kGroup : 0;
    // Wide heads have more steps than the compiler finds registers for at once.
#pragma unroll(kHeadDim <= 256 ? kChunks<K> : 1)
    for (int chunk = 0; chunk < kChunks<K>; chunk += KeyChunks::kAtOnce) {
      KeyChunks chunks;
      chunks.template load<false>(tile, chunk);
#pragma unroll
      for (int i = 0; i < KeyChunks::kSplits; ++i) {
        uint32_t pairs[KeyChunks::kPairs][kEights];
        chunks.template split<K, kPlain>(i, pairs);
#pragma unroll
        for (int s = 0; s < KeyChunks::kPairs / 2; ++s) {
          const int step = KeyChunks::first_pair(chunk, i) / 2 + s;
          if (step >= kSteps) continue;
          Query q;
          if constexpr (Lanes::kHoldsQueries) {
#pragma unroll
            for (int w = 0; w < kTerms * Lanes::kQueryWords; ++w) {
              q[w / Lanes::kQueryWords][w % Lanes::kQueryWords] =
                  query[step][w / Lanes::kQueryWords][w % Lanes::kQueryWords];
            }
          } else {
            load_query(step, block, q, zero);
          }
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
#pragma unroll
            for (int m = 0; m < kProducts; ++m) {
              Lanes::template add_scores<K>(sum[term][m], q[term], pairs[2 * s], pairs[2 * s + 1],
                                            m);
            }
          }
          if constexpr (Keys::kTokenScaled) {
            const int group = K::channel(2 * step, 0) / Keys::kGroup;
            const bool last =
                step + 1 == kSteps || K::channel(2 * step + 2, 0) / Keys::kGroup != group;
            if (last) {
#pragma unroll
              for (int m = 0; m < kProducts; ++m) {
                const Floats2 scale = scales.two_columns(group, m);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  const float one = joined(sum, m, e) * (Lanes::column_of(e) ? scale.y : scale.x);
                  x[m][e] = group == 0 ? one : x[m][e] + one;
                }
              }
              if (group + 1 < kGroups) begin_group(group + 1, sum);
            }
          }
        }
      }
    }
    if constexpr (!Keys::kTokenScaled) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[m][e] = joined(sum, m, e);
          if constexpr (Keys::kHasZeroPoint && !Lanes::kHoldsQueries) {
            x[m][e] += joined_zero_points(zero, e);
          }
        }
      }
    }
  }

  KVQUANT_DEVICE void begin_group(int group, Scores& sum) const {
    float start[2] = {zero_points[0], zero_points[1]};
    if constexpr (Queries<Keys>::kHasOffset) {
#pragma unroll
      for (int r = 0; r < 2; ++r) start[r] = queries.sums[group * kRows + Lanes::row(r)];
    }
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[0][m][e] = start[Lanes::row_of(e)];
        if constexpr (kTerms == 2) sum[1][m][e] = 0.0f;
      }
    }
  }
  // The sum of both terms' products, if there are two.
  static KVQUANT_DEVICE float joined(const Scores& sum, int m, int e) {
    if constexpr (kTerms == 2) return sum[0][m][e] + sum[1][m][e] * (1.0f / kSecondTerm);
    return sum[0][m][e];
  }

  // Loads the queries into registers, for a block if the keys are on the channel grid.
  KVQUANT_DEVICE void take_queries(int block) {
    ZeroPoints<K> zero[kTerms] = {};
#pragma unroll
    for (int step = 0; step < Queries<Keys>::kSteps; ++step) {
      load_query(step, block, query[step], zero);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) zero_points[r] = joined_zero_points(zero, r);
  }
  // Loads the queries of one step; keys on the channel grid: for a block, as to_block() says.
  KVQUANT_DEVICE void load_query(int step, int block, Query& q,
                                 ZeroPoints<K> (&zero)[kTerms]) const {
    uint32_t words[kTerms * Lanes::kQueryWords];
    queries.fragment(step, words);
    if constexpr (Keys::kChannelGrid && kTerms == 2) {
      floats_to_block<Keys>(key_header(block), step, words, q, zero);
      return;
    }
#pragma unroll
    for (int i = 0; i < kTerms * Lanes::kQueryWords; ++i) {
      q[i / Lanes::kQueryWords][i % Lanes::kQueryWords] = words[i];
    }
    if constexpr (Keys::kChannelGrid) {
      to_block<Keys>(key_header(block), step, q[0], zero[0]);
    }
  }
  static KVQUANT_DEVICE float joined_zero_points(const ZeroPoints<K> (&zero)[kTerms], int e) {
    const float sum = of_zero_points<K>(zero[0], e);
    if constexpr (kTerms == 2) return sum + of_zero_points<K>(zero[1], e) * (1.0f / kSecondTerm);
    return sum;
  }

  KVQUANT_DEVICE void hide(uint32_t bits, bool by_row, int lane_column, int first,
                           float (&x)[kProducts][4]) const {
    const QueryRows block_rows(p);
    const RowMask rows[2] = {RowMask(mask, block_rows, Lanes::row(0)),
                             RowMask(mask, block_rows, Lanes::row(1))};
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = Lanes::column(m, Lanes::column_of(e)), column = shuffle(lane_column, i);
        Seen s = {(bits >> i & 1u) != 0, 0.0f};
        if (s.seen && by_row) {
          s = rows[Lanes::row_of(e)].at(column, columns.is_slot(first + i), kCopiedKeysHere,
                                        kCopiedValuesHere);
        }
        x[m][e] = s.seen ? x[m][e] + s.bias * kLog2e : -infinity();
      }
    }
  }

  // acc += weights x values; x has the weights, in the order of score(). column: the tile's first.
  template <bool kPlain>
  KVQUANT_DEVICE void weigh(SharedPtr<uint8_t> tile, int column, const ValueScales& scales,
                            bool plain, const float (&x)[kProducts][4]) {
    if constexpr (kIsFloats<V>) {
      float weights[kProducts][4];
      scaled_weights(scales, 0, plain, x, weights);
      FloatValues<V, kTile>::weigh(tile, weights, acc);
      return;
    }
    using ValueChunks = Chunks<V, ValueTile>;
    using SplitCodec = typename Choose<kCentred, Centred<V>, V>::Type;
    Weights w;
    NonFinite<V> found;
    int group = -1;
#pragma unroll
    for (int chunk = 0; chunk < kChunks<V>; chunk += ValueChunks::kAtOnce) {
      ValueChunks chunks;
      chunks.template load<true>(tile, chunk);
#pragma unroll
      for (auto& of_chunk : chunks.words) {
#pragma unroll
        for (auto& word : of_chunk) found.take_out(word);
      }
#pragma unroll
      for (int i = 0; i < ValueChunks::kSplits; ++i) {
        uint32_t pairs[ValueChunks::kPairs][kEights];
        chunks.template split<SplitCodec, kPlain>(i, pairs);
#pragma unroll
        for (int j = 0; j < ValueChunks::kPairs; j += 2) {
          const int pair = ValueChunks::first_pair(chunk, i) + j;
          if (pair >= V::kPairs) continue;
          const int pair_group = Values::kTokenScaled ? V::channel(pair, 0) / Values::kGroup : 0;
          if (pair_group != group) {
            group = pair_group;
            weights(scales, group, plain, x, w);
          }
          constexpr int kHere = 2 / Lanes::kPairsOfProduct;
          const int product = pair / Lanes::kPairsOfProduct;
          float of_tile[kHere][4] = {};
          float (*sums)[4] = kSumsTiles    ? of_tile
                             : kSumsBlocks ? &of_block[product]
                                           : &acc[product];
#pragma unroll
          for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
            for (int term = 0; term < kWeightTerms; ++term) {
              Lanes::template add_values<V>(sums, w[term][k], pairs[j], pairs[j + 1], k);
            }
          }
          if constexpr (kSumsTiles && !Values::kChannelGrid) {
#pragma unroll
            for (int h = 0; h < kHere; ++h) {
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[product + h][e] += of_tile[h][e];
            }
          } else if constexpr (kSumsTiles) {
            const auto scale_row = shared_cast<Words2>(value_header(column / Values::kGroup));
#pragma unroll
            for (int h = 0; h < kHere; ++h) add_scaled(product + h, of_tile[h], scale_row);
          }
        }
      }
    }
    if constexpr ((kHasOffset && !kCentred) || Values::kHasZeroPoint) {
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
        for (int term = 0; term < kWeightTerms; ++term) Lanes::add_ones(weight_sum, w[term][k]);
      }
    }
    found.template add<kTile>(tile, w[0], acc);
  }

  // Channel grid: adds sums of weighted codes, times the scales of their channels.
  KVQUANT_DEVICE void add_scaled(int product, const float (&sums)[4], SharedPtr<Words2> scale_row) {
    const Floats2 scale = Lanes::template of_channels<V>(scale_row, product);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      acc[product][e] += sums[e] * (Lanes::column_of(e) ? scale.y : scale.x);
    }
  }
  // Channel grid: adds what is known only when the last tile of a block, or of this warp, is done.
  KVQUANT_DEVICE void close_block(int block) {
    const auto scale_row = shared_cast<Words2>(value_header(block));
    if constexpr (kSumsBlocks) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        add_scaled(i, of_block[i], scale_row);
#pragma unroll
        for (int e = 0; e < 4; ++e) of_block[i][e] = 0.0f;
      }
    }
    if constexpr (Values::kHasZeroPoint) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float down = 1.0f / V::unit(i * Lanes::kPairsOfProduct);
        const Floats2 zero = Lanes::template of_channels<V>(scale_row + kShareDim / 4, i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[i][e] += weight_sum[e] * down * (Lanes::column_of(e) ? zero.y : zero.x);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) weight_sum[e] = 0.0f;
    }
  }

  // The operands of one group of values: weights times scales.
  KVQUANT_DEVICE void weights(const ValueScales& scales, int group, bool plain,
                              const float (&x)[kProducts][4], Weights& w) const {
    float scaled[kProducts][4];
    scaled_weights(scales, group, plain, x, scaled);
    Lanes::template pack_weights<V>(scaled, w[0]);
    if constexpr (kWeightTerms == 2) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scaled[m][e] -= half_low(pack_half2(scaled[m][e], 0.0f));
      }
      Lanes::template pack_weights<V>(scaled, w[1]);
    }
  }
  KVQUANT_DEVICE void scaled_weights(const ValueScales& scales, int group, bool plain,
                                     const float (&x)[kProducts][4],
                                     float (&scaled)[kProducts][4]) const {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      Floats2 scale = {kWeightUnit, kWeightUnit};
      if constexpr (Values::kTokenScaled) scale = scales.two_columns(group, m);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scaled[m][e] = x[m][e] * (Lanes::column_of(e) ? scale.y : scale.x);
        if (!plain && float_bits(x[m][e]) == 0x80000000u) scaled[m][e] = -0.0f;
      }
    }
  }

  KVQUANT_DEVICE void rescale_all(float row0, float row1) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[i][e] *= Lanes::row_of(e) ? row1 : row0;
        if constexpr (kSumsBlocks) of_block[i][e] *= Lanes::row_of(e) ? row1 : row0;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) weight_sum[e] *= Lanes::row_of(e) ? row1 : row0;
  }
  KVQUANT_DEVICE void raise_reference(float largest) {
    const float next = bits_float((float_bits(largest) & 0x7f800000u) + 0x00800000u);
    rescale_all(reference / next, reference / next);
    reference = next;
  }
};

}  // namespace kvquant
