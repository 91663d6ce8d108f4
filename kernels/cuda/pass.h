// One pass of a block over its columns, written once for every kind of column and every codec.
//
//   warp w        consecutive tiles, with buffers and a softmax of its own: the block has no
//                 barrier between the first tile and the last
//
//     tile        0        1        2        3                    kStages = 2
//     copies      0 1      2        3                             cp.async, 16 bytes a lane
//     scales      0   1      2        3                           a register ahead
//     scores        0        1        2        3                  MMA: queries x keys
//     softmax        0        1        2        3
//     values          0        1        2        3                MMA: weights x values
//
//   block         adds up the warps' results in a tree of fixed shape, writes one partial result
//
// Codes are never multiplied by their scales. On the token grid, scores are multiplied by the key's
// scale, and weights by the value's. On the channel grid, queries are multiplied by the scales of a
// block; its zero points are treated as one more key, whose score is added to all of the block.
//
// Weights times scales must fit FP16. Scales of values are therefore divided by `reference`, a
// power of two above the largest so far; the sums are kept in the same unit.
//
// Most tiles are plain: every row sees each of their columns, without a bias, a softcap or a copy.
// Which ones is known before the loop, from one load of the mask. The other tiles look again, column
// by column.
//
// A hidden column has weight 0, whatever is stored there: its scores and scales are replaced, not
// changed. Codes are finite in every codec. Dense values that are not finite are taken out of the
// product and added one by one (NonFinite).
#pragma once

#include "cuda/masks.h"
#include "cuda/non_finite.h"
#include "cuda/partials.h"
#include "cuda/queries.h"
#include "cuda/scales.h"
#include "cuda/softmax.h"
#include "cuda/tiles.h"

namespace kvquant {

// As many bits as a warp may have tiles.
template <bool kMany>
struct Bits {
  using Type = uint32_t;
};
template <>
struct Bits<true> {
  using Type = uint64_t;
};

// kCopied..: rows come from exact copies, and the columns are a list; without them, a range.
template <class Keys, class Values, bool kCopiedKeysHere, bool kCopiedValuesHere, int kTileRows,
          int kNumStages, int kNumWarps>
struct Pass {
  using K = typename Keys::Codec;
  using V = typename Values::Codec;
  using KeyTile = Tile<K, kTileRows>;
  using ValueTile = Tile<V, kTileRows>;
  static constexpr bool kInOrder = !kCopiedKeysHere && !kCopiedValuesHere;
  static constexpr int kTile = kTileRows, kStages = kNumStages, kWarps = kNumWarps;
  static constexpr int kEights = kTile / 8;
  // The offset of values is subtracted once per row, times the sum of weights; with several groups,
  // from every code (kCentred).
  using TileBits = typename Bits<(kMostColumns / kWarps > 32 * kTile)>::Type;
  static constexpr bool kHasOffset = V::kOffset != 0.0f;
  using KeyScales = TokenScales<Keys, kTile>;
  using ValueScales = TokenScales<Values, kTile>;
  static constexpr bool kCentred = kHasOffset && ValueScales::kGroups > 1;
  static constexpr bool kHasZeroPoint = Keys::kChannelGrid && !kIsE4M3<K>;

  // Shared memory of the block, in bytes from its beginning.
  static constexpr int kSlot = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kTreeBytes = kWarps / 2 * V::kPairs * 512;
  static constexpr int kTilesBytes =
      kStages * kWarps * kSlot > kTreeBytes ? kStages * kWarps * kSlot : kTreeBytes;
  static constexpr int kHeader = Keys::kChannelGrid ? 4 * kHeadDim : 0;
  static constexpr int kHeadersAt = kTilesBytes;
  static constexpr int kQueriesAt = kHeadersAt + kStages * kWarps * kHeader;
  static constexpr int kScalesAt = kQueriesAt + Queries<Keys>::kBytes;
  static constexpr int kStatesAt = kScalesAt + kWarps * (KeyScales::kBytes + ValueScales::kBytes);
  static constexpr int kBytes = kStatesAt + kWarps * kRows * 8;

  const Place& p;
  const Columns<!kInOrder>& columns;
  const Mask& mask;
  const SharedPtr<uint8_t> memory;
  const Queries<Keys> queries;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;

  const uint8_t* const key_scale_rows =
      reinterpret_cast<const uint8_t*>(p.of_head(p.a.keys.scale, p.a.keys.scale_stride));

  RowsSoftmax softmax;
  float acc[V::kPairs][4] = {};  // [pair][row g: 2t, 2t + 1; row g + 8: 2t, 2t + 1]
  float weight_sum[4] = {};      // rows g, g, g + 8, g + 8; the weights are rounded
  float reference = 0.0f;

  KVQUANT_DEVICE Pass(const Place& p, const Columns<!kInOrder>& columns, const Mask& mask,
                      SharedPtr<uint8_t> memory)
      : p(p), columns(columns), mask(mask), memory(memory), queries(memory + kQueriesAt) {}

  KVQUANT_DEVICE SharedPtr<uint8_t> slot(int tile) const {
    return memory + (tile % kStages * kWarps + warp) * kSlot;
  }
  KVQUANT_DEVICE SharedPtr<uint16_t> header(int block) const {
    return shared_cast<uint16_t>(memory +
                                 (kHeadersAt + (block % kStages * kWarps + warp) * kHeader));
  }

  template <class KeyRows, class ValueRows>
  KVQUANT_DEVICE void run(const KeyRows& key_rows, const ValueRows& value_rows) {
    const int tiles = (columns.count + kTile - 1) / kTile;
    const int of_block = kInOrder ? Splits::columns(p.a, p.kv_len) / kTile : tiles,
              share = (of_block + kWarps - 1) / kWarps;
    const int begin = warp * share, end = begin + share < tiles ? begin + share : tiles;
    KeyScales key_scales(p.a.keys, p, memory + kScalesAt + warp * KeyScales::kBytes);
    ValueScales value_scales(
        p.a.values, p,
        memory + kScalesAt + kWarps * KeyScales::kBytes + warp * ValueScales::kBytes);

    for (int i = begin; i < begin + kStages - 1; ++i) issue(i, begin, end, key_rows, value_rows);
    if (begin < end) {
      key_scales.fetch(columns, begin * kTile);
      value_scales.fetch(columns, begin * kTile);
    }
    const TileBits plain = plain_tiles(begin);
    queries.template prepare<kWarps>(p);
    block_barrier();

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = queries.factors[g + 8 * r];
    for (int i = begin; i < end; ++i) {
      if constexpr (kStages == 1) issue(i, begin, end, key_rows, value_rows);
      cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
      warp_barrier();  // tile i is complete, and tile i - 1 has been read
      if constexpr (kStages > 1) issue(i + kStages - 1, begin, end, key_rows, value_rows);
      if (kInOrder && (plain >> (i - begin) & 1u)) {
        attend<true>(i, i == begin, i + 1 < end, key_scales, value_scales, factor);
      } else {
        attend<false>(i, i == begin, i + 1 < end, key_scales, value_scales, factor);
      }
      if constexpr (kStages == 1) warp_barrier();
    }
    softmax.finish();
  }

  // Bit i: tile `begin` + i of this warp is plain.
  KVQUANT_DEVICE TileBits plain_tiles(int begin) const {
    if constexpr (!kInOrder) return 0;
    constexpr int kWords = (kMostColumns / kWarps + 31) / 32;
    static_assert(kWords * 32 / kTile <= 8 * int(sizeof(TileBits)), "a bit for each tile");
    if (p.a.softcap != 0.0 || !mask.is_shared) return 0;
    const int from = columns.begin + begin * kTile + lane, past = columns.begin + columns.count,
              end = past < mask.plain_end ? past : mask.plain_end;
    if (p.a.mask_kind == kNoMask && columns.sinks.last < columns.begin + begin * kTile) {
      const int whole = (end - columns.begin) / kTile - begin;
      return whole >= 8 * int(sizeof(TileBits)) ? ~TileBits(0)
             : whole > 0                        ? (TileBits(1) << whole) - 1
                                                : 0;
    }
    const uint32_t seen = mask.plain<kWords>(from, end);
    TileBits tiles = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = warp_ballot((seen >> i & 1u) != 0 && !columns.sinks.has(from + 32 * i));
      if constexpr (kTile == 32) {
        tiles |= TileBits(word == ~0u) << i;
      } else {
        tiles |= (TileBits((word & 0xffffu) == 0xffffu) | TileBits(word >> 16 == 0xffffu) << 1)
                 << 2 * i;
      }
    }
    return tiles;
  }

  // Starts the copy of a tile of this warp. Every tile commits a group, even an empty one, because
  // the waits count groups.
  template <class KeyRows, class ValueRows>
  KVQUANT_DEVICE void issue(int tile, int begin, int end, const KeyRows& key_rows,
                            const ValueRows& value_rows) const {
    if (tile < end) {
      const SharedPtr<uint8_t> to = slot(tile);
      KeyTile::copy(to, key_rows, columns, tile * kTile);
      ValueTile::copy(to + KeyTile::kBytes, value_rows, columns, tile * kTile);
      if constexpr (Keys::kChannelGrid) {
        const int column = columns.begin + tile * kTile, block = column / Keys::kGroup;
        if (tile == begin || column % Keys::kGroup == 0) {
          copy_header(p.a.keys, key_scale_rows, block, shared_cast<uint8_t>(header(block)),
                      kHasZeroPoint);
        }
      }
    }
    cp_async_commit();
  }

  // kPlain: the tile is one of plain_tiles().
  template <bool kPlain>
  KVQUANT_DEVICE void attend(int tile, bool is_first, bool has_next, KeyScales& key_scales,
                             ValueScales& value_scales, const float (&factor)[2]) {
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
    if (warp_any(bigger)) raise_reference(value_scales.largest(bits));
    value_scales.store(bits, reference);
    if (has_next) {
      key_scales.fetch(columns, first + kTile);
      value_scales.fetch(columns, first + kTile);
    }
    if constexpr (Keys::kChannelGrid) {
      const int at = columns.begin + first, block = at / Keys::kGroup;
      if (is_first || at % Keys::kGroup == 0) {
        order_header<kHasZeroPoint>(shared_cast<Words4>(header(block)));
      }
    }
    warp_barrier();  // the scales are written
    if (bits == 0) return;

    float x[kEights][4];
    score(slot(tile), columns.begin + first, key_scales, x);
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][e] *= factor[e / 2];
    }
    if (!kPlain && p.a.softcap != 0.0) {
      const ScoreRule rule(p.a);
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][e] = rule(x[m][e]);
      }
    }
    const bool plain = kPlain || (bits == all && !by_row);
    if (!plain) hide(bits, by_row, column, first, x);

    float largest[2] = {-infinity(), -infinity()}, rescale[2];
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], x[m][e]);
    }
    if (softmax.update(largest, rescale)) rescale_all(rescale[0], rescale[1]);
    const float base[2] = {softmax.base(0), softmax.base(1)};
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // A hidden column has weight -0, which differs from a weight that underflowed.
        const bool hidden = !plain && x[m][e] == -infinity();
        x[m][e] = hidden ? -0.0f : exp2_approx(x[m][e] - base[e / 2]);
        softmax.sum[e / 2] += x[m][e];
      }
    }
    weigh(slot(tile) + KeyTile::kBytes, value_scales, plain, x);
  }

  // x[m]: scores of rows g and g + 8 with the columns 8m + 2t and 8m + 2t + 1, before the factor of
  // the query.
  KVQUANT_DEVICE void score(SharedPtr<uint8_t> tile, int column, const KeyScales& scales,
                            float (&x)[kEights][4]) const {
    // The number of chunks that make whole steps and whole loads.
    constexpr int kChunksOfStep = K::kPairsOfWord == 1 ? 2 : 1;
    constexpr int kAtOnce = kChunksOfStep > KeyTile::kAtOnce ? kChunksOfStep : KeyTile::kAtOnce;
    constexpr int kLoads = kAtOnce / KeyTile::kAtOnce, kGroups = KeyScales::kGroups;
    constexpr int kSteps = K::kPairs / 2;
    // Queries x zero points, for the steps whose unit is unit(0), and for the others.
    float zero[4] = {}, other_zero[4] = {};
    float sum[kEights][4];
    begin_group(0, sum);
    const int block = Keys::kChannelGrid ? column / Keys::kGroup : 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks<K>; chunk += kAtOnce) {
      uint32_t pairs[kAtOnce * K::kPairsOfWord][kEights];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        uint32_t words[4];
        KeyTile::template load<false>(tile, chunk + l * KeyTile::kAtOnce, words);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t split[K::kPairsOfWord];
          K::split(words[w], split);
          const int c = l * KeyTile::kAtOnce + w / kEights;
#pragma unroll
          for (int i = 0; i < K::kPairsOfWord; ++i) {
            pairs[c * K::kPairsOfWord + i][w % kEights] = split[i];
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kAtOnce * K::kPairsOfWord / 2; ++s) {
        const int step = chunk * K::kPairsOfWord / 2 + s;
        if (step >= kSteps) continue;
        uint32_t a[4];
        queries.fragment(step, a);
        if constexpr (Keys::kChannelGrid) {
          to_block(step, block, a, K::unit(2 * step) == K::unit(0) ? zero : other_zero);
        }
#pragma unroll
        for (int m = 0; m < kEights; ++m) {
          const uint32_t b[2] = {pairs[2 * s][m], pairs[2 * s + 1][m]};
          multiply<K>(sum[m], a, b);
        }
        if constexpr (Keys::kTokenScaled) {
          const int group = K::channel(2 * step, 0) / Keys::kGroup;
          const bool last =
              step + 1 == kSteps || K::channel(2 * step + 2, 0) / Keys::kGroup != group;
          if (last) {
#pragma unroll
            for (int m = 0; m < kEights; ++m) {
              const Floats2 scale = scales.two_columns(group, 8 * m + 2 * t);
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const float one = sum[m][e] * (e % 2 ? scale.y : scale.x);
                x[m][e] = group == 0 ? one : x[m][e] + one;
              }
            }
            if (group + 1 < kGroups) begin_group(group + 1, sum);
          }
        }
      }
    }
    if constexpr (!Keys::kTokenScaled) {
      constexpr float kUnit = 1.0f / K::unit(0);
      constexpr float kOther = K::kPairs > 2 ? K::unit(0) / K::unit(2) : 1.0f;
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[m][e] =
              kHasZeroPoint ? sum[m][e] + (zero[e] + kOther * other_zero[e]) * kUnit : sum[m][e];
        }
      }
    }
  }

  KVQUANT_DEVICE void begin_group(int group, float (&sum)[kEights][4]) const {
    float start[2] = {0.0f, 0.0f};
    if constexpr (Queries<Keys>::kHasOffset) {
#pragma unroll
      for (int r = 0; r < 2; ++r) start[r] = queries.sums[group * kRows + g + 8 * r];
    }
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][e] = start[e / 2];
    }
  }

  // Multiplies the queries of one step by the scales of a block of the channel grid; adds queries x
  // zero points to `zero`.
  KVQUANT_DEVICE void to_block(int step, int block, uint32_t (&a)[4], float (&zero)[4]) const {
    // A lane's four channels are neighbours. In a chunk with half the channels, lanes without
    // channels read those of another lane; their queries are zeros.
    const int lane_channel =
        K::channel(2 * step, 0) + 4 * (K::channel(2 * step, 7) < 0 ? t % 2 : t);
    const auto words = shared_cast<Words2>(header(block));
    const Words2 scale = words[lane_channel / 4];
    if constexpr (kHasZeroPoint) {
      const Words2 points = words[(kHeadDim + lane_channel) / 4];
      const uint32_t b[2] = {points.x, points.y};
      mma_m16n8k16_f16(zero, a, b);
    }
    a[0] = hmul2(a[0], scale.x);
    a[1] = hmul2(a[1], scale.x);
    a[2] = hmul2(a[2], scale.y);
    a[3] = hmul2(a[3], scale.y);
  }

  KVQUANT_DEVICE void hide(uint32_t bits, bool by_row, int lane_column, int first,
                           float (&x)[kEights][4]) const {
    const QueryRows block_rows(p);
    const RowMask rows[2] = {RowMask(mask, block_rows, g), RowMask(mask, block_rows, g + 8)};
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 8 * m + 2 * t + e % 2, column = shuffle(lane_column, i);
        Seen s = {(bits >> i & 1u) != 0, 0.0f};
        if (s.seen && by_row) {
          s = rows[e / 2].at(column, columns.is_slot(first + i), kCopiedKeysHere,
                             kCopiedValuesHere);
        }
        x[m][e] = s.seen ? x[m][e] + s.bias * kLog2e : -infinity();
      }
    }
  }

  // acc += weights x values; x has the weights, in the order of score().
  KVQUANT_DEVICE void weigh(SharedPtr<uint8_t> tile, const ValueScales& scales, bool plain,
                            const float (&x)[kEights][4]) {
    uint32_t a[kEights / 2][4];
    NonFinite<V> found;
    int group = -1;
#pragma unroll
    for (int chunk = 0; chunk < kChunks<V>; chunk += ValueTile::kAtOnce) {
      uint32_t words[4];
      ValueTile::template load<true>(tile, chunk, words);
      uint32_t pairs[4][V::kPairsOfWord];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        found.take_out(words[w]);
        if constexpr (kCentred) {
          V::split_centred(words[w], pairs[w]);
        } else {
          V::split(words[w], pairs[w]);
        }
      }
#pragma unroll
      for (int i = 0; i < ValueTile::kAtOnce * V::kPairsOfWord; ++i) {
        const int pair = chunk * V::kPairsOfWord + i;
        if (pair >= V::kPairs) continue;
        const int pair_group = Values::kScaled ? V::channel(pair, 0) / Values::kGroup : 0;
        if (pair_group != group) {
          group = pair_group;
          weights(scales, group, plain, x, a);
        }
#pragma unroll
        for (int k = 0; k < kEights / 2; ++k) {
          const int w = i / V::kPairsOfWord * kEights + 2 * k;
          const uint32_t b[2] = {pairs[w][i % V::kPairsOfWord], pairs[w + 1][i % V::kPairsOfWord]};
          multiply<V>(acc[pair], a[k], b);
        }
      }
    }
    if constexpr (kHasOffset && !kCentred) {
#pragma unroll
      for (int k = 0; k < kEights / 2; ++k) {
        const uint32_t ones[2] = {0x3c003c00u, 0x3c003c00u};
        mma_m16n8k16_f16(weight_sum, a[k], ones);
      }
    }
    found.template add<kTile>(tile, a, acc);
  }

  // The A operands of one group of values: weights times scales.
  KVQUANT_DEVICE void weights(const ValueScales& scales, int group, bool plain,
                              const float (&x)[kEights][4], uint32_t (&a)[kEights / 2][4]) const {
#pragma unroll
    for (int m = 0; m < kEights; ++m) {
      Floats2 scale = {kWeightUnit, kWeightUnit};
      if constexpr (Values::kScaled) scale = scales.two_columns(group, 8 * m + 2 * t);
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = x[m][e] * (e % 2 ? scale.y : scale.x);
        if (!plain && float_bits(x[m][e]) == 0x80000000u) w[e] = -0.0f;
      }
      a[m / 2][m % 2 * 2] = pack<V>(w[0], w[1]);
      a[m / 2][m % 2 * 2 + 1] = pack<V>(w[2], w[3]);
    }
  }

  KVQUANT_DEVICE void rescale_all(float row0, float row1) {
#pragma unroll
    for (int pair = 0; pair < V::kPairs; ++pair) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[pair][e] *= e / 2 ? row1 : row0;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) weight_sum[e] *= e / 2 ? row1 : row0;
  }
  KVQUANT_DEVICE void raise_reference(float largest) {
    const float next = bits_float((float_bits(largest) & 0x7f800000u) + 0x00800000u);
    rescale_all(reference / next, reference / next);
    reference = next;
  }
};

}  // namespace kvquant
