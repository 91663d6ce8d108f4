// Scores of, and weighted sums over, a tile of columns in dot products of stored codes.
//
// Four inputs of sixteen outputs are one vector; it is made in registers from the stored rows and
// multiplied with four weights of each query row, while the loads, shuffles and shifts of the next
// one go on beside the multiplications:
//
//   score        outputs: 16 columns    inputs: channels   weights: the query, scales folded in
//                  16 bytes of each of 16 columns -> transpose quads -> 4 vectors of 4 channels
//   accumulate   outputs: channels      inputs: columns    weights: probabilities x values' scales
//                  64 bytes of each of 4 columns -> interleave bytes -> 4 vectors of 16 channels
//
// Nibbles that are multiplied in pairs (`PairDot`): score has 4 pairs of channels in a vector, as
// they are stored; accumulate pairs columns i and i + 16.
//
// The instruction takes one operand without signs. Of keys that is the codes: symmetric ones have
// an offset (xor 128, or the nibble as it is), which comes off as offset x the sum of the weights.
// Of values it is the weights, which are never negative.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/dot_avx512.h"
#include "cpu/methods.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Inlined into one function, GCC runs out of registers for the loops.
#define KVQUANT_NOINLINE __attribute__((noinline))

constexpr int kMaxDotDim = 256;  // so that sums of a group fit 32 bits
constexpr int kMaxGroups = kMaxDotDim / 16;
constexpr int kMaxDotRows = 64 + 3;  // query rows of a call, padded

// How stored bytes become operands of a dot product.
//
// Keys: `expand` makes kOut vectors of one. They are codes from 0 on, their numbers (kTimes * dot -
// kOffset * sum of weights) / kTimes.
template <class Format, bool kCentered, int kBytes>
struct KeyOperand {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 1, kTimes = 1, kOffset = kCentered ? 128 : 0;
  void expand(Quads x, Quads* out) const { out[0] = kCentered ? x ^ Quads(128) : x; }
};
template <bool kCentered, int kBytes>
struct KeyOperand<Nibble, kCentered, kBytes> {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 2, kTimes = kCentered ? 2 : 1, kOffset = kCentered ? 15 : 0;
  void expand(Quads x, Quads* out) const {
    out[0] = x.low_nibbles();
    out[1] = x.high_nibbles();
  }
};
struct PairedKeys {
  using Dot = PairDot;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 1, kTimes = 2, kOffset = 15;
  void expand(Quads x, PairDot::Codes* out) const { out[0] = x; }
};
// Values are taken in kSteps steps of kColumns columns, of which step s takes those from first(s)
// on, and in kHalves parts: `take` reads one of the four vectors of a step, `expand` makes kOut of
// each after bytes were interleaved. The numbers are dot * kUnit + kHalf * sum of weights.
//
// Bytes are signed, their weights are not.
template <class Dot_>
struct FourColumns {
  using Dot = Dot_;
  static constexpr int kColumns = 4, kHalves = 1, kOut = 1;
  static constexpr float kUnit = 1.0f, kHalf = 0.0f;
  static int first(int step) { return 4 * step; }
  template <int>
  static Quads take(const uint8_t* column, int64_t, int bytes) {
    return Quads::load_first(column, bytes);
  }
};
template <class Format, int kBytes>
struct ValueOperand : FourColumns<IntDot<kBytes, false>> {
  template <int>
  void expand(Quads x, Quads* out) const {
    out[0] = x;
  }
};
template <int kBytes>
struct ValueOperand<Nibble, kBytes> : FourColumns<IntDot<kBytes, false>> {
  static constexpr int kHalves = 2;
  static constexpr float kUnit = 0.0625f, kHalf = 0.5f;
  template <int kPart>
  void expand(Quads x, Quads* out) const {
    out[0] = kPart ? x.high_centered() : x.low_centered();
  }
};
struct PairedValues {
  using Dot = PairDot;
  static constexpr int kColumns = 8, kHalves = 2, kOut = 1;
  static constexpr float kUnit = 1.0f, kHalf = -7.5f;
  static int first(int step) { return step / 4 * 32 + step % 4 * 4; }
  template <int kPart>
  static Quads take(const uint8_t* column, int64_t row_bytes, int bytes) {
    const Quads a = Quads::load_first(column, bytes);
    const Quads b = Quads::load_first(column + 16 * row_bytes, bytes);
    return kPart ? Quads::pair_high(a, b) : Quads::pair_low(a, b);
  }
  template <int>
  void expand(Quads x, PairDot::Codes* out) const {
    out[0] = x;
  }
};
#ifdef __AVX512BF16__
template <int kPasses>
struct E4M3Operand : FourColumns<Bf16Dot<kPasses>> {
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 2, kTimes = 1, kOffset = 0;
  const E4M3ToBf16 table;
  template <int = 0>
  void expand(Quads x, Quads* out) const {
    table.expand(x, out);
  }
};
#endif

// Weights that share a factor: number = factor * weight.
struct Share {
  float factor;
  int32_t sum;  // of the weights
};

// Splits n numbers (a multiple of 16) into `Dot::kPasses` rows of quads, which have room for a
// multiple of 64 numbers.
template <class Dot, bool kSum>
inline Share make_weights(const float* x, int n, float factor, int32_t* quads, int stride) {
  const Vec inverse(Dot::inverse(factor));
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < n; c += 64) {
    Vec v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = c + 16 * i < n ? Vec::load(x + c + 16 * i) * inverse : Vec(0.0f);
    }
    sum = _mm512_add_epi32(sum, Dot::split(v, n - c, quads + Dot::quads(c), stride));
  }
  return {factor, kSum ? Dot::total(sum) : 0};
}

// The rows of 64 columns: where they are stored, or, if fewer are left, a copy in `rest`.
inline const uint8_t* whole_tile(const Body& body, int64_t first, int n, uint8_t* rest) {
  const uint8_t* rows = body.data + first * body.row_bytes;
  if (n == kTile) return rows;
  std::memcpy(rest, rows, n * body.row_bytes);
  std::memset(rest + n * body.row_bytes, 0, (kTile - n) * body.row_bytes);
  return rest;
}

// The token grid's scales of group g, of n columns from `first` on.
inline void load_scales(const Body& body, int g, int64_t first, int n, float* scale) {
  const int64_t groups = body.num_scales;
  const uint16_t* from = body.scale + first * groups + g;
  if (groups == 1) return halves_to_floats(from, n, scale);
  for (int i = 0; i < n; ++i) scale[i] = to_float(Half{from[i * groups]});
}

// Calls f(first row, std::integral_constant<number of rows>) for blocks of at most kMost rows.
template <int kMost, class F>
inline void for_row_blocks(int rows, F f) {
  int r = 0;
  for (; kMost == 4 && r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>());
  for (; kMost >= 2 && r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>());
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
}

// The next tile is fetched while this one is computed, spread evenly: more at once would queue.
inline void prefetch_tile(const uint8_t* p, int64_t row_bytes) {
  __builtin_prefetch(p + kTile * row_bytes, 0, 2);
}

// A place in each of 16 columns: that of column 4 l + i is group[l] + column[i]. GCC would keep 16
// pointers, for which there are no registers.
struct Columns16 {
  const uint8_t* group[4];
  int64_t column[4];

  Columns16(const uint8_t* p, int64_t row_bytes) {
    for (int i = 0; i < 4; ++i) {
      group[i] = p + 4 * i * row_bytes;
      column[i] = i * row_bytes;
      asm("" : "+r"(group[i]), "+r"(column[i]));
    }
  }
  void advance(int bytes) {
#pragma GCC unroll 4
    for (int64_t& c : column) {
      c += bytes;
      asm("" : "+r"(c));
    }
  }
};

template <class Operand>
struct DotKeys {
  using Dot = typename Operand::Dot;
  static constexpr int kQuads = Dot::quads(kMaxDotDim + 64);
  // Columns and query rows whose sums, with the codes, fit the registers.
  static constexpr int kVecs = Dot::kSums == 1 ? 2 : 1, kMaxRows = 4;

  // A query row, split; on the channel grid of the present block, with its scales folded in.
  struct alignas(64) Row {
    int32_t quads[Dot::kPasses][kQuads];
    Share share[kMaxGroups];
    float zero;  // the zero points' part of every score
  };

  static size_t prepared_bytes(const Body&, int rows) { return rows * sizeof(Row); }

  static void prepare(const Body& keys, const float* q, int rows, void* prepared) {
    if (keys.channel_grid) return;
    Row* row = static_cast<Row*>(prepared);
    const int length = int(keys.group_length);
    for (int r = 0; r < rows; ++r, ++row, q += keys.head_dim) {
      for (int g = 0; g < keys.num_scales; ++g) {
        const int quad = Dot::quads(g * length);
        Largest largest;
        for (int c = 0; c < length; c += 16) largest.take(Vec::load(q + g * length + c));
        row->share[g] = make_weights<Dot, Operand::kOffset != 0>(
            q + g * length, length, Dot::factor(largest), row->quads[0] + quad, kQuads);
      }
    }
  }

  static void score(const Body& keys, int64_t first, int n, uint64_t, const float* q,
                    void* prepared, int rows, float* scores) {
    Row* row = static_cast<Row*>(prepared);
    if (keys.channel_grid) {
      const int64_t at = first / keys.group_length * keys.head_dim;
      for_row_blocks<4>(rows, [&](int r, auto block) {
        fold_scales<block>(keys, at, q + r * keys.head_dim, row + r);
      });
    }
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(keys, first, n, rest);

    const int groups = keys.channel_grid ? 1 : int(keys.num_scales);
    const int group_bytes = int(keys.row_bytes / groups);
    const int group_quads = Dot::quads(keys.head_dim / groups);
    alignas(64) float scale[kTile];
    for (int g = 0; g < groups; ++g, data += group_bytes) {
      if (!keys.channel_grid) load_scales(keys, g, first, n, scale);
      for (int i = 0; i < kTile; i += kVecs * Quads::kCount) {
        for_row_blocks<kMaxRows>(rows, [&](int r, auto block) {
          score_columns<block>(data + i * keys.row_bytes, keys.row_bytes, group_bytes, row + r, g,
                               g * group_quads, keys.channel_grid ? nullptr : scale + i,
                               scores + r * kTile + i);
        });
      }
    }
  }

 private:
  // The weights of kRows query rows for the block whose scales begin at `at`; its zero points' part
  // of a score is the same for all columns. Step by step for all rows, because each step waits for
  // the one before it.
  template <int kRows>
  KVQUANT_NOINLINE static void fold_scales(const Body& keys, int64_t at, const float* q, Row* row) {
    const int n = keys.head_dim;
    alignas(64) float scaled[kRows][kMaxDotDim];
    Vec zero[kRows];
    Largest largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) zero[r] = Vec(0.0f);
    for (int c = 0; c < n; c += Vec::kWidth) {
      const Vec scale = Vec::load((const Half*)(keys.scale + at + c));
      const Vec zero_point =
          keys.zero_point ? Vec::load((const Half*)(keys.zero_point + at + c)) : Vec(0.0f);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec v = Vec::load(q + r * n + c), x = v * scale;
        x.store(scaled[r] + c);
        largest[r].take(x);
        zero[r] = Vec::fma(v, zero_point, zero[r]);
      }
    }
    float factor[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r].zero = Vec::sum(zero[r]);
      factor[r] = Dot::factor(largest[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r].share[0] = make_weights<Dot, Operand::kOffset != 0>(scaled[r], n, factor[r],
                                                                 row[r].quads[0], kQuads);
    }
  }

  // Scores of kVecs times 16 columns over the `bytes` bytes of each from `columns` on, which are
  // group g: with the weights of kRows query rows from `quad` on, and the columns' scales, if any.
  template <int kRows>
  KVQUANT_NOINLINE static void score_columns(const uint8_t* columns, int64_t row_bytes, int bytes,
                                             const Row* row, int g, int quad, const float* scale,
                                             float* scores) {
    Dot acc[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v].clear();
    }
    Columns16 at(columns, row_bytes);
    for (int c = 0; c + 16 <= bytes; c += 16, quad += 4 * Operand::kOut) {
      for (int i = 0; i < 16 * kVecs; i += 4)
        prefetch_tile(columns + (c * kVecs + i) * 16, row_bytes);
      score_piece<kRows, 4>(at, row_bytes, row, quad, acc);
      at.advance(16);
    }
    if (Operand::kNibbles && bytes % 16) score_piece<kRows, 2>(at, row_bytes, row, quad, acc);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Share share = row[r].share[g];
      const Vec factor(share.factor / Operand::kTimes);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        float* out = scores + r * kTile + v * Vec::kWidth;
        const Vec dot = acc[r][v].result(Operand::kTimes, Operand::kOffset, share.sum);
        const Vec s = scale ? dot * factor * Vec::load(scale + v * Vec::kWidth)
                            : Vec::fma(dot, factor, Vec(row[r].zero));
        (g == 0 ? s : s + Vec::load(out)).store(out);
      }
    }
  }
  template <int kRows, int kByteQuads>
  static inline void score_piece(const Columns16& at, int64_t row_bytes, const Row* row, int quad,
                                 Dot (*acc)[kVecs]) {
    const Operand operand{};
    Quads in[kVecs][4];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        in[v][i] = Quads::lanes(at.group, at.column[i] + v * 16 * row_bytes, kByteQuads == 2);
      }
      Quads::transpose_quads(in[v]);
    }
#pragma GCC unroll 4
    for (int d = 0; d < kByteQuads; ++d) {
      typename Dot::Codes codes[kVecs][Operand::kOut];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) operand.expand(in[v][d], codes[v]);
#pragma GCC unroll 2
      for (int o = 0; o < Operand::kOut; ++o) {
        // Nibbles: the high ones are the next channels; BF16: the other two of four numbers.
        const int at = quad + (Operand::kNibbles ? o * kByteQuads + d : d * Operand::kOut + o);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          if constexpr (kVecs == 1) {
            acc[r][0].add(codes[0][o], row[r].quads[0] + at, kQuads);
          } else {
            const typename Dot::Weights weights(row[r].quads[0] + at, kQuads);
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) acc[r][v].add(codes[v][o], weights);
          }
        }
      }
    }
  }
};

template <class Operand>
struct DotValues {
  using Dot = typename Operand::Dot;
  static constexpr int kChunk = sizeof(Quads);  // bytes of a row that are taken at once
  // Vectors of sums of a chunk: bytes 0..3, 4..7, 8..11, 12..15 of every lane. Nibbles have as
  // many again, of their high halves.
  static constexpr int kHalves = Operand::kHalves, kSums = 4 * kHalves * Vec::kWidth;
  static constexpr int kQuads = Dot::quads(kTile);
  // A chunk is gone through so often, each time for so many vectors of sums and rows as fit the
  // registers.
  static constexpr int kParts = Dot::kSums == 1 ? 1 : 2, kPasses = kHalves * kParts;
  static constexpr int kVecs = 4 / kParts, kMaxRows = 4;

  // Weights of one row: probabilities with the scales of a group folded in.
  struct alignas(64) Row {
    int32_t quads[Dot::kPasses][kQuads];
    float factor;
  };

  // Calls f(group, first byte, number of bytes, first of the 64 sums) for each chunk of a row.
  template <class F>
  static void for_chunks(const Body& values, F f) {
    const int group_bytes = int(values.row_bytes / values.num_scales);
    int sum = 0;
    for (int g = 0; g < values.num_scales; ++g) {
      for (int c = 0; c < group_bytes; c += kChunk, sum += kSums) {
        f(g, g * group_bytes + c, group_bytes - c < kChunk ? group_bytes - c : kChunk, sum);
      }
    }
  }

  // A row of sums: those of the chunks, and if numbers are half a code off, the weights of each
  // group.
  static size_t acc_floats(const Body& values) {
    return weights_at(values) + (Operand::kHalf != 0.0f ? values.num_scales * Vec::kWidth : 0);
  }

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(values, first, n, rest);
    Row row[kMaxDotRows];
    const size_t acc_dim = acc_floats(values), weights = weights_at(values);
    int weighted = -1;
    for_chunks(values, [&](int g, int byte, int bytes, int first_sum) {
      if (g != weighted) {
        alignas(64) float scale[kTile];
        load_scales(values, g, first, n, scale);
        for_row_blocks<4>(rows, [&](int r, auto block) {
          make_rows<block>(scale, columns + r, p + r * kTile, row + r,
                           acc + r * acc_dim + weights + g * Vec::kWidth, acc_dim);
        });
      }
      weighted = g;
      for_row_blocks<kMaxRows>(rows, [&](int r, auto block) {
        float* sums = acc + r * acc_dim + first_sum;
        accumulate_chunk<block, 0>(data + byte, values.row_bytes, bytes, row + r, sums, acc_dim);
      });
    });
  }

  // Sums of a chunk: vector 4 * half + i has, in lane l, those of the bytes 16 l + 4 i .. + 4.
  static void finish(const Body& values, int rows, float* acc) {
    const size_t acc_dim = acc_floats(values), weights = weights_at(values);
    alignas(64) float sums[kMaxDotDim + 16];
    for (int r = 0; r < rows; ++r, acc += acc_dim) {
      for_chunks(values, [&](int g, int byte, int bytes, int first_sum) {
        Vec rest(0.0f);
        if (Operand::kHalf != 0.0f)
          rest = Vec(Operand::kHalf * Vec::sum(Vec::load(acc + weights + g * Vec::kWidth)));
        for (int half = 0; half < kHalves; ++half) {
          Vec sum[4];
          for (int i = 0; i < 4; ++i)
            sum[i] = Vec::load(acc + first_sum + (4 * half + i) * Vec::kWidth);
          Quads::transpose_lanes(sum);
          // Of the last 16 nibbles half a vector counts: the next ones overwrite the rest.
          for (int b = 0; b < bytes; b += 16) {
            const int channel =
                kHalves == 2 ? nibble_channel(byte + b, half, values.head_dim) : byte + b;
            (sum[b / 16] + rest).store(sums + channel);
          }
        }
      });
      for (int c = 0; c < values.head_dim; c += Vec::kWidth) Vec::load(sums + c).store(acc + c);
    }
  }

 private:
  // The first of the weights' sums in a row of sums.
  static size_t weights_at(const Body& values) {
    size_t n = 0;
    for_chunks(values, [&](int, int, int, int sum) { n = sum + kSums; });
    return n;
  }

  // The weights of kRows rows for group g, and their sums. Step by step for all rows, because each
  // step waits for the one before it.
  template <int kRows>
  KVQUANT_NOINLINE static void make_rows(const float* scale, const uint64_t* columns,
                                         const float* p, Row* row, float* weights, size_t acc_dim) {
    constexpr int kVecs = kTile / Vec::kWidth;
    Vec w[kRows][kVecs];
    Largest largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        w[r][i] = Vec::load(p + r * kTile + i * Vec::kWidth) * Vec::load(scale + i * Vec::kWidth);
      }
      // What is hidden may have no scale yet.
      if (columns[r] != ~uint64_t(0)) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
          w[r][i] = Vec::where(uint32_t(columns[r] >> i * Vec::kWidth), w[r][i], Vec(0.0f));
      }
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) largest[r].take(w[r][i]);
    }
    float factor[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) factor[r] = Dot::factor(largest[r]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r].factor = factor[r];
      const Vec inverse(Dot::inverse(factor[r]));
#pragma GCC unroll 4
      for (Vec& x : w[r]) x = x * inverse;
      const Vec sum(_mm512_cvtepi32_ps(Dot::split(w[r], kTile, row[r].quads[0], kQuads)));
      if (Operand::kHalf != 0.0f) {
        float* sums = weights + r * acc_dim;
        Vec::fma(sum, Vec(factor[r]), Vec::load(sums)).store(sums);
      }
    }
  }

  // Adds to the sums of a chunk those over 64 columns of the `bytes` bytes of each from `columns`
  // on, in passes: of the lower or upper eight bytes of every lane, or of all; of low nibbles, then
  // of high ones.
  template <int kRows, int kPass>
  KVQUANT_NOINLINE static void accumulate_chunk(const uint8_t* columns, int64_t row_bytes,
                                                int bytes, const Row* row, float* sums,
                                                size_t acc_dim) {
    constexpr int kNibble = kPass / kParts, kPart = kPass % kParts;
    const Operand operand{};
    Dot acc[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v].clear();
    }
    for (int s = 0; s < kTile / Operand::kColumns; ++s) {
      const uint8_t* p = columns + Operand::first(s) * row_bytes;
      prefetch_columns<kPass>(columns + s * Operand::kColumns * row_bytes, row_bytes);
      Quads in[4], x[kVecs];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        in[i] = operand.template take<kNibble>(p + i * row_bytes, row_bytes, bytes);
      if (kParts == 1 || kPart == 0) Quads::interleave_bytes(in, 0, x);
      if (kParts == 1 || kPart == 1) Quads::interleave_bytes(in, 1, x + (kVecs - 2));
      typename Dot::Codes codes[kVecs][Operand::kOut];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) operand.template expand<kNibble>(x[v], codes[v]);
#pragma GCC unroll 2
      for (int o = 0; o < Operand::kOut; ++o) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename Dot::Weights weights(row[r].quads[0] + s * Operand::kOut + o, kQuads);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) acc[r][v].add(codes[v][o], weights);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec factor(row[r].factor * Operand::kUnit);
      float* out = sums + r * acc_dim + (4 * kNibble + kVecs * kPart) * Vec::kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v, out += Vec::kWidth) {
        Vec::fma(acc[r][v].result(), factor, Vec::load(out)).store(out);
      }
    }
    if constexpr (kPass + 1 < kPasses)
      accumulate_chunk<kRows, kPass + 1>(columns, row_bytes, bytes, row, sums, acc_dim);
  }
  // Of the columns of a step each pass fetches its share.
  template <int kPass>
  static void prefetch_columns(const uint8_t* p, int64_t row_bytes) {
#pragma GCC unroll 8
    for (int i = kPass; i < Operand::kColumns; i += kPasses)
      prefetch_tile(p + i * row_bytes, row_bytes);
  }
};

template <class Operand>
KeyMethod dot_keys() {
  return {DotKeys<Operand>::prepared_bytes, DotKeys<Operand>::prepare, DotKeys<Operand>::score};
}
template <class Operand>
ValueMethod dot_values() {
  return {DotValues<Operand>::accumulate, DotValues<Operand>::acc_floats,
          DotValues<Operand>::finish};
}

// A group of nibbles must be whole pieces of 32 channels, a tile must lie in one block of keys.
inline bool dot_takes(const KvquantSide& side) {
  if (side.head_dim > kMaxDotDim) return false;
  if (side.grid == kChannelGrid) return side.group_length >= kTile;
  return side.format != kInt4 || side.group_length % 32 == 0 || side.group_length == side.head_dim;
}

// kBytes and kNumbers: the precision of weights, of integers and of BF16; 12 bits for pairs do as
// well as the latter.
template <int kBytes, int kNumbers>
KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  constexpr bool kPairs = kNumbers == 1;
  const bool channel = side.grid == kChannelGrid;
  if (dot_takes(side)) {
    if (side.format == kInt8) {
      return channel ? dot_keys<KeyOperand<Unsigned8, false, kBytes>>()
                     : dot_keys<KeyOperand<Signed8, true, kBytes>>();
    }
    // On the channel grid weights have the blocks' scales, which may differ by more than 12 bits.
    if (side.format == kInt4 && kPairs && !channel) return dot_keys<PairedKeys>();
    if (side.format == kInt4) {
      return channel ? dot_keys<KeyOperand<Nibble, false, kBytes>>()
                     : dot_keys<KeyOperand<Nibble, true, kBytes>>();
    }
#ifdef __AVX512BF16__
    if (side.format == kFp8) {
      // A BF16 query is one BF16 number only as long as nothing is done to it.
      constexpr int kRounded = kNumbers < 2 ? 2 : kNumbers;
      return channel || side.rotate ? dot_keys<E4M3Operand<kRounded>>()
                                    : dot_keys<E4M3Operand<kNumbers>>();
    }
#endif
  }
  return float_key_method(side, dtype);
}
inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_key_method<3, 3>(side, dtype)
         : dtype == kFloat16 ? dot_key_method<2, 2>(side, dtype)
                             : dot_key_method<2, 1>(side, dtype);
}

template <int kBytes, int kNumbers>
ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  constexpr bool kPairs = kNumbers == 1;
  if (dot_takes(side)) {
    if (side.format == kInt8) return dot_values<ValueOperand<Signed8, kBytes>>();
    if (side.format == kInt4 && kPairs) return dot_values<PairedValues>();
    if (side.format == kInt4) return dot_values<ValueOperand<Nibble, kBytes>>();
#ifdef __AVX512BF16__
    if (side.format == kFp8) return dot_values<E4M3Operand<kNumbers>>();
#endif
  }
  return float_value_method(side, dtype);
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_value_method<3, 3>(side, dtype)
         : dtype == kFloat16 ? dot_value_method<2, 2>(side, dtype)
                             : dot_value_method<2, 1>(side, dtype);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
