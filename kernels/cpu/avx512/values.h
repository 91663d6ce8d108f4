// Weighted sums over a tile of columns in dot products; methods.h draws the loops.
#pragma once

#include "cpu/whole_tile.h"
#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// How stored values become operands. A step takes kColumns columns; those of step s begin at column
// first(s). `take` reads one of the four vectors of a step; their bytes are interleaved; `expand`
// turns each result into kOut vectors of codes. Nibbles take kHalves = 2 rounds, the low ones and
// then the high ones. The elements' weighted sum follows from the dot product of weights and codes:
//   kUnit * dot product + kShift * sum of weights
//
// 8-bit codes are signed; their weights are unsigned.
template <class Dot_>
struct FourColumns {
  using Dot = Dot_;
  static constexpr int kColumns = 4, kHalves = 1, kOut = 1;
  static constexpr float kUnit = 1.0f, kShift = 0.0f;
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
  static constexpr float kUnit = 0.0625f, kShift = 0.5f;
  template <int kPart>
  void expand(Quads x, Quads* out) const {
    out[0] = kPart ? x.high_centered() : x.low_centered();
  }
};
struct PairedValues {
  using Dot = PairDot;
  static constexpr int kColumns = 8, kHalves = 2, kOut = 1;
  static constexpr float kUnit = 1.0f, kShift = -7.5f;
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

template <class Operand>
struct QuadValues {
  using Dot = typename Operand::Dot;
  static constexpr int kChunk = sizeof(Quads);  // bytes of a row that are read at once
  // A chunk has four vectors of sums, for bytes 0 .. 3, 4 .. 7, 8 .. 11 and 12 .. 15 of every lane.
  // Nibbles need four more, for the high ones.
  static constexpr int kHalves = Operand::kHalves, kSums = 4 * kHalves * Vec::kWidth;
  static constexpr int kQuads = Dot::quads(kTile);
  // The registers hold the sums of kVecs vectors and kRowsAtOnce rows, so each chunk is read
  // kPasses times.
  static constexpr int kParts = Dot::kSums == 1 ? 1 : 2, kPasses = kHalves * kParts;
  static constexpr int kVecs = 4 / kParts, kRowsAtOnce = 4;

  // The weights of one query row: probabilities times the scales of a group.
  struct alignas(64) Row {
    int32_t quads[Dot::kPlanes][kQuads];
    float factor;
  };

  // Calls f(group, first byte, number of bytes, index of the first sum) for each chunk of a row.
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

  // A row of `acc` has the sums of its chunks and, if codes are shifted, the sums of the weights of
  // each group.
  static size_t acc_floats(const Body& values) {
    return weights_at(values) + (Operand::kShift != 0.0f ? values.num_scales * Vec::kWidth : 0);
  }

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(values, first, n, rest);
    Row row[kMaxPaddedRows];
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
      for_row_blocks<kRowsAtOnce>(rows, [&](int r, auto block) {
        float* sums = acc + r * acc_dim + first_sum;
        accumulate_chunk<block, 0>(data + byte, values.row_bytes, bytes, row + r, sums, acc_dim);
      });
    });
  }

  // Lane l of vector 4 * half + i has the sums of the bytes 16 l + 4 i .. 16 l + 4 i + 3 of a
  // chunk.
  static void finish(const Body& values, int rows, float* acc) {
    const size_t acc_dim = acc_floats(values), weights = weights_at(values);
    alignas(64) float sums[kMaxDotDim + 16];
    for (int r = 0; r < rows; ++r, acc += acc_dim) {
      for_chunks(values, [&](int g, int byte, int bytes, int first_sum) {
        Vec rest(0.0f);
        if (Operand::kShift != 0.0f)
          rest = Vec(Operand::kShift * Vec::sum(Vec::load(acc + weights + g * Vec::kWidth)));
        for (int half = 0; half < kHalves; ++half) {
          Vec sum[4];
          for (int i = 0; i < 4; ++i)
            sum[i] = Vec::load(acc + first_sum + (4 * half + i) * Vec::kWidth);
          Quads::transpose_lanes(sum);
          // In a chunk of 16 nibbles only half of the vector is valid; the high nibbles, which are
          // stored next, overwrite the other half.
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
  // Where the sums of weights begin in a row of `acc`.
  static size_t weights_at(const Body& values) {
    size_t n = 0;
    for_chunks(values, [&](int, int, int, int sum) { n = sum + kSums; });
    return n;
  }

  // Makes the weights of kRows rows for one group, and adds them to their sums. The rows advance
  // together, because the steps of one row wait for each other.
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
      // A hidden column may have no scale yet.
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
      if (Operand::kShift != 0.0f) {
        float* sums = weights + r * acc_dim;
        Vec::fma(sum, Vec(factor[r]), Vec::load(sums)).store(sums);
      }
    }
  }

  // Adds the weighted sums of one chunk over 64 columns to `sums`. In the first column the chunk is
  // the `bytes` bytes at `columns`. Pass kPass takes the low or the high nibbles, and (kParts =
  // 2) the lower or the upper eight bytes of every lane; it calls the next pass.
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
  // Each pass prefetches its share of the columns of a step.
  template <int kPass>
  static void prefetch_columns(const uint8_t* p, int64_t row_bytes) {
#pragma GCC unroll 8
    for (int i = kPass; i < Operand::kColumns; i += kPasses)
      prefetch_tile(p + i * row_bytes, row_bytes);
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
