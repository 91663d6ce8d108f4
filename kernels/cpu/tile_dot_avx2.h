// Scores of, and weighted sums over, a tile of columns in 16-bit dot products of stored codes, for
// machines with vectors of 256 bits (dot_avx2.h).
//
//   score        2 columns x 4 query rows (or 4 x 2, 8 x 1)    eight sums, one vector each
//                  along head_dim        widen 32 channels of each column, multiply with each row's
//                                        weights: the query, scales folded in
//                totals                  eight vectors -> eight scores; four times -> 8 columns of
//                                        each row
//   accumulate   16 channels x 4 query rows                    eight sums, one vector each
//                  along the columns     interleave bytes of two columns, widen, multiply with each
//                                        row's pair of weights: probabilities x values' scales
//
// Channels stay in their order, so that neither weights nor sums are ever rearranged. Float queries
// and fp8 codes go through tile_float.h; so does what `takes_words` refuses.
#pragma once

#include "cpu/dot_avx2.h"
#include "cpu/methods.h"
#include "cpu/tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Bytes of 16 channels.
template <class Format>
constexpr int kBytesOf16 = 16;
template <>
constexpr int kBytesOf16<Nibble> = 8;

// Of the channel grid codes count from 0 on, of the token grid from the midpoint.
template <class Format, bool kChannel>
struct DotKeys {
  static constexpr float kOffset = kChannel ? 0.0f : Format::kMidpoint;

  // A query row; on the channel grid of the present block, with its scales folded in.
  struct alignas(32) Row {
    int16_t weights[kMaxDotDim];
    float factor;
    float offset[kMaxGroups];  // comes off the dot product of each group
    float zero;                // the zero points' part of every score
  };

  static size_t prepared_bytes(const Body&, int rows) { return rows * sizeof(Row); }

  static void prepare(const Body& keys, const float* q, int rows, void* prepared) {
    if (kChannel) return;
    Row* row = static_cast<Row*>(prepared);
    const int length = int(keys.group_length);
    for (int r = 0; r < rows; ++r, ++row, q += keys.head_dim) {
      Largest largest;
      for (int c = 0; c < keys.head_dim; c += Vec::kWidth) largest.take(Vec::load(q + c));
      row->factor = largest.factor();
      for (int g = 0; g < keys.num_scales; ++g) {
        row->offset[g] = kOffset * make_weights(q, g * length, length, row);
      }
    }
  }

  static void score(const Body& keys, int64_t first, int n, uint64_t, const float* q,
                    void* prepared, int rows, float* scores) {
    Row* row = static_cast<Row*>(prepared);
    if (kChannel) {
      const int64_t at = first / keys.group_length * keys.head_dim;
      for_row_blocks<4>(rows, [&](int r, auto block) {
        fold_scales<block>(keys, at, q + r * keys.head_dim, row + r);
      });
    }
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(keys, first, n, rest);

    const int groups = kChannel ? 1 : int(keys.num_scales), channels = keys.head_dim / groups;
    alignas(32) float scale[kTile];
    for (int g = 0; g < groups; ++g, data += channels / 16 * kBytesOf16<Format>) {
      if (!kChannel) load_scales(keys, g, first, n, scale);
      for (int i = 0; i < kTile; i += Vec::kWidth) {
        for_row_blocks<4>(rows, [&](int r, auto block) {
          score_columns<block>(data + i * keys.row_bytes, keys.row_bytes, channels, row + r, g,
                               scale + i, scores + r * kTile + i);
        });
      }
    }
  }

 private:
  static float make_weights(const float* x, int begin, int n, Row* row) {
    WeightMaker maker(row->factor);
    for (int c = begin; c < begin + n; c += 16)
      maker.make(Vec::load(x + c), Vec::load(x + c + 8), row->weights + c);
    return maker.sum();
  }

  // The weights of kRows query rows for the block whose scales begin at `at`; its zero points' part
  // of a score is the same for all columns.
  template <int kRows>
  KVQUANT_NOINLINE static void fold_scales(const Body& keys, int64_t at, const float* q, Row* row) {
    const int n = keys.head_dim;
    alignas(32) float scaled[kRows][kMaxDotDim];
    Vec zero[kRows];
    Largest largest[kRows];
    scale_queries<kRows>(keys, at, q, scaled, largest, zero);
    for (int r = 0; r < kRows; ++r) {
      row[r].zero = Vec::sum(zero[r]);
      row[r].factor = largest[r].factor();
    }
    for (int r = 0; r < kRows; ++r) make_weights(scaled[r], 0, n, row + r);
  }

  // Scores of 8 columns over the channels of group g, which begin at `columns`: with the weights of
  // kRows query rows, and on the token grid the columns' scales.
  template <int kRows>
  KVQUANT_NOINLINE static void score_columns(const uint8_t* columns, int64_t row_bytes,
                                             int channels, const Row* row, int g,
                                             const float* scale, float* scores) {
    // A pass takes kOfLane columns from kOfLane * pass on, and as many from 4 columns later on:
    // then a lane of its totals has the same columns of every row.
    constexpr int kOfLane = 4 / kRows;
    Vec totals[kRows];
#pragma GCC unroll 1
    for (int pass = 0; pass < kRows; ++pass, columns += kOfLane * row_bytes) {
      PairSums sums[8];
#pragma GCC unroll 8
      for (PairSums& s : sums) s.clear();
      int c = 0, byte = 0;
      for (; c + 32 <= channels; c += 32, byte += 2 * kBytesOf16<Format>)
        score_piece<kRows, 2>(columns + byte, row_bytes, row, g * channels + c, sums);
      if (c < channels)
        score_piece<kRows, 1>(columns + byte, row_bytes, row, g * channels + c, sums);
      totals[pass] = PairSums::totals(sums);
    }
    PairSums::transpose<kRows>(totals);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, scores += kTile) {
      const Vec factor(row[r].factor);
      const Vec s = kChannel ? Vec::fma(totals[r], factor, Vec(row[r].zero))
                             : (totals[r] - Vec(row[r].offset[g])) * factor * Vec::load(scale);
      (g == 0 ? s : s + Vec::load(scores)).store(scores);
    }
  }
  template <int kRows, int kWords>
  static inline void score_piece(const uint8_t* columns, int64_t row_bytes, const Row* row, int c,
                                 PairSums* sums) {
    constexpr int kOfLane = 4 / kRows;
    const auto column = [&](int j) {
      return columns + (j % kOfLane + j / kOfLane * 4) * row_bytes;
    };
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kOfLane; j += 2) {
      Words a[kWords], b[kWords];
      prefetch_tile(column(j), row_bytes);
      prefetch_tile(column(j + 1), row_bytes);
      load_channels<kWords>(Format{}, column(j), a);
      load_channels<kWords>(Format{}, column(j + 1), b);
#pragma GCC unroll 2
      for (int i = 0; i < kWords; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Words weights = Words::load(row[r].weights + c + 16 * i);
          sums[j * kRows + r].add(a[i], weights);
          sums[(j + 1) * kRows + r].add(b[i], weights);
        }
      }
    }
  }
};

template <class Format>
struct DotValues {
  static constexpr int kPiece = kBytesOf16<Format>;

  // Weights of one row: probabilities with the scales of a group folded in.
  struct Row {
    alignas(32) int16_t weights[kTile];
    float factor;
    float offset;  // comes off every sum
  };

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(values, first, n, rest);
    Row row[kMaxDotRows];
    const int group_bytes = int(values.row_bytes / values.num_scales);
    for (int g = 0; g < values.num_scales; ++g) {
      alignas(32) float scale[kTile];
      load_scales(values, g, first, n, scale);
      for (int r = 0; r < rows; ++r) make_row(scale, columns[r], p + r * kTile, row + r);
      for (int byte = g * group_bytes; byte < (g + 1) * group_bytes; byte += kPiece) {
        for_row_blocks<4>(rows, [&](int r, auto block) {
          accumulate_piece<block>(values, data + byte, byte, row + r, acc + r * values.head_dim);
        });
      }
    }
  }

 private:
  KVQUANT_NOINLINE static void make_row(const float* scale, uint64_t columns, const float* p,
                                        Row* row) {
    constexpr int kVecs = kTile / Vec::kWidth;
    Vec w[kVecs];
    Largest largest;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      w[i] = Vec::load(p + i * Vec::kWidth) * Vec::load(scale + i * Vec::kWidth);
      // What is hidden may have no scale yet.
      if (columns != ~uint64_t(0))
        w[i] = Vec::where(uint32_t(columns >> i * Vec::kWidth), w[i], Vec(0.0f));
      largest.take(w[i]);
    }
    row->factor = largest.factor();
    WeightMaker maker(row->factor);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; i += 2) maker.make(w[i], w[i + 1], row->weights + 8 * i);
    row->offset = Format::kMidpoint == 0.0f ? 0.0f : Format::kMidpoint * maker.sum();
  }

  // Adds to the sums of the 16 channels in kPiece bytes from `byte` of a row on; `columns` is there
  // in the first one.
  template <int kRows>
  KVQUANT_NOINLINE static void accumulate_piece(const Body& values, const uint8_t* columns,
                                                int byte, const Row* row, float* acc) {
    const int64_t row_bytes = values.row_bytes;
    PairSums sums[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r][0].clear();
      sums[r][1].clear();
    }
    for (int i = 0; i < kTile; i += 2, columns += 2 * row_bytes) {
      Words codes[2];
      prefetch_tile(columns + byte / kPiece % 2 * row_bytes, row_bytes);
      load_pairs(Format{}, columns, columns + row_bytes, codes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Words weights = Words::pair(row[r].weights + i);
        sums[r][0].add(codes[0], weights);
        sums[r][1].add(codes[1], weights);
      }
    }
    constexpr bool kNibbles = std::is_same<Format, Nibble>::value;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, acc += values.head_dim) {
      const Vec factor(row[r].factor), offset(row[r].offset);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* out =
            acc + (kNibbles ? nibble_channel(byte, half, values.head_dim) : byte + 8 * half);
        Vec::fma(sums[r][half].numbers() - offset, factor, Vec::load(out)).store(out);
      }
    }
  }
};

template <class Format, bool kChannel>
KeyMethod dot_keys() {
  using Keys = DotKeys<Format, kChannel>;
  return {Keys::prepared_bytes, Keys::prepare, Keys::score};
}
template <class Format>
ValueMethod dot_values() {
  ValueMethod method = float_values<TokenRows<Format>>();  // sums in the order of channels
  method.accumulate = DotValues<Format>::accumulate;
  return method;
}

inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  if (!takes_words(side, dtype)) return float_key_method(side, dtype);
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kInt8)
    return channel ? dot_keys<Unsigned8, true>() : dot_keys<Signed8, false>();
  return channel ? dot_keys<Nibble, true>() : dot_keys<Nibble, false>();
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  if (!takes_words(side, dtype)) return float_value_method(side, dtype);
  return side.format == kInt8 ? dot_values<Signed8>() : dot_values<Nibble>();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
