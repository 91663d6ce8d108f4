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
//   kUnit * dot product + (kCenter - midpoint) * sum of weights
// and on the channel grid, where an element is zero point + scale * code, that of the codes:
//   kUnit * dot product + kCenter * sum of weights
//
// 8-bit codes are signed; their weights are unsigned.
template <class Dot_>
struct FourColumns {
  using Dot = Dot_;
  static constexpr int kColumns = 4, kHalves = 1, kOut = 1;
  static constexpr float kUnit = 1.0f, kCenter = 0.0f;
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
struct ValueOperand<Unsigned8, kBytes> : FourColumns<IntDot<kBytes, false>> {
  static constexpr float kCenter = 128.0f;
  template <int>
  void expand(Quads x, Quads* out) const {
    out[0] = x ^ Quads(128);
  }
};
template <int kBytes>
struct ValueOperand<Nibble, kBytes> : FourColumns<IntDot<kBytes, false>> {
  static constexpr int kHalves = 2;
  static constexpr float kUnit = 0.0625f, kCenter = 8.0f;
  template <int kPart>
  void expand(Quads x, Quads* out) const {
    out[0] = kPart ? x.high_centered() : x.low_centered();
  }
};
struct PairedValues {
  using Dot = PairDot;
  static constexpr int kColumns = 8, kHalves = 2, kOut = 1;
  static constexpr float kUnit = 1.0f, kCenter = 0.0f;
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

  // The weights of one query row: probabilities, on the token grid times the scales of a group.
  struct alignas(64) Row {
    int32_t quads[Dot::kPlanes][kQuads];
    float factor;
    float total;  // channel grid: of the probabilities
  };

  // Channel grid: what the sums of a chunk become values with, in the order of the sums.
  struct alignas(64) Affine {
    float scale[kSums], zero[kSums];
  };

  static int num_groups(const Body& values) {
    return values.channel_grid ? 1 : int(values.num_scales);
  }

  static int group_bytes(const Body& values) {
    const int groups = num_groups(values);
    return groups == 1 ? int(values.row_bytes) : int(values.row_bytes) / groups;
  }

  // Calls f(group, first byte, number of bytes, index of the first sum) for each chunk of a row.
  template <class F>
  static void for_chunks(const Body& values, F f) {
    const int groups = num_groups(values), length = group_bytes(values);
    int sum = 0;
    for (int g = 0; g < groups; ++g) {
      for (int c = 0; c < length; c += kChunk, sum += kSums)
        f(g, g * length + c, std::min(length - c, kChunk), sum);
    }
  }

  // A row of `acc` has the sums of its chunks and, if codes are shifted, the sums of the weights of
  // each group.
  static bool is_shifted(const Body& values) { return kHalves == 2 && !values.channel_grid; }
  static size_t acc_floats(const Body& values) {
    return weights_at(values) + (is_shifted(values) ? values.num_scales * Vec::kWidth : 0);
  }

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(values, first, n, rest);
    Row row[kMaxPaddedRows];
    const size_t acc_dim = acc_floats(values);
    float* weights = is_shifted(values) ? acc + weights_at(values) : nullptr;
    const int groups = num_groups(values), length = group_bytes(values);
    for (int g = 0; g < groups; ++g) {
      uint16_t room[kTile];
      weigh(values.channel_grid ? nullptr : scales_of(values, g, first, n, room), columns, p, rows,
            row, weights, acc_dim);
      if (weights) weights += Vec::kWidth;
      for (int c = 0; c < length; c += kChunk, acc += kSums)
        accumulate_rows(values, first, data, g * length + c, std::min(length - c, kChunk), rows,
                        row, acc, acc_dim);
    }
  }

  // Lane l of vector 4 * half + i has the sums of the bytes 16 l + 4 i .. 16 l + 4 i + 3 of a
  // chunk.
  static void finish(const Body& values, int rows, float* acc) {
    const size_t acc_dim = acc_floats(values), weights = weights_at(values);
    alignas(64) float sums[kMaxDotDim + 16];
    for (int r = 0; r < rows; ++r, acc += acc_dim) {
      for_chunks(values, [&](int g, int byte, int bytes, int first_sum) {
        Vec rest(0.0f);
        if (is_shifted(values))
          rest = Vec((Operand::kCenter - values.midpoint) *
                     Vec::sum(Vec::load(acc + weights + g * Vec::kWidth)));
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
  // Scales and zero points of a chunk's channels in the block of column `first`; see `finish` for
  // the order of the sums.
  static void load_affine(const Body& values, int64_t first, int byte, int bytes, Affine& affine) {
    const int64_t at = first / values.group_length * values.head_dim;
    for (int half = 0; half < kHalves; ++half) {
      Vec scale[4], zero[4];
      for (int b = 0; b < 64; b += 16) {
        const int channel =
            kHalves == 2 && b < bytes ? nibble_channel(byte + b, half, values.head_dim) : byte + b;
        const bool is_there = b < bytes;
        Vec& s = scale[b / 16] =
            is_there ? Vec::load((const Half*)(values.scale + at + channel)) : Vec(0.0f);
        zero[b / 16] = s * Vec(Operand::kCenter);
        if (is_there && values.zero_point)
          zero[b / 16] = zero[b / 16] + Vec::load((const Half*)(values.zero_point + at + channel));
      }
      Quads::transpose_lanes(scale);
      Quads::transpose_lanes(zero);
      for (int i = 0; i < 4; ++i) {
        scale[i].store(affine.scale + (4 * half + i) * Vec::kWidth);
        zero[i].store(affine.zero + (4 * half + i) * Vec::kWidth);
      }
    }
  }

  // Where the sums of weights begin in a row of `acc`.
  static size_t weights_at(const Body& values) {
    return size_t(num_groups(values) * ((group_bytes(values) + kChunk - 1) / kChunk) * kSums);
  }

  // Functions of their own, because loops over blocks of rows take registers from the loops around.
  KVQUANT_NOINLINE static void weigh(const uint16_t* scale, const uint64_t* columns, const float* p,
                                     int rows, Row* row, float* weights, size_t acc_dim) {
    for_row_blocks<4>(rows, [&](int r, auto block) {
      make_rows<block>(scale, columns + r, p + r * kTile, row + r,
                       weights ? weights + r * acc_dim : nullptr, acc_dim);
    });
  }
  // Adds the weighted sums of the chunk of `bytes` bytes from `byte` on in every row of `data`.
  KVQUANT_NOINLINE static void accumulate_rows(const Body& values, int64_t first,
                                               const uint8_t* data, int byte, int bytes, int rows,
                                               const Row* row, float* sums, size_t acc_dim) {
    Affine affine;
    if (values.channel_grid) load_affine(values, first, byte, bytes, affine);
    for_row_blocks<kRowsAtOnce>(rows, [&](int r, auto block) {
      accumulate_chunk<block, 0>(data + byte, row_step(values), bytes, row + r,
                                 values.channel_grid ? &affine : nullptr, sums + r * acc_dim,
                                 acc_dim);
    });
  }

  // Makes the weights of kRows rows for one group (`scale`: null on the channel grid), and adds them
  // to their sums, if these are given. The rows advance together, because the steps of one row wait
  // for each other.
  template <int kRows>
  KVQUANT_NOINLINE static void make_rows(const uint16_t* scale, const uint64_t* columns,
                                         const float* p, Row* row, float* weights, size_t acc_dim) {
    constexpr int kVecs = kTile / Vec::kWidth;
    Vec w[kRows][kVecs];
    Largest largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        w[r][i] = Vec::load(p + r * kTile + i * Vec::kWidth);
        if (scale) w[r][i] = w[r][i] * Vec::load((const Half*)scale + i * Vec::kWidth);
      }
      // A hidden column may have no scale yet.
      if (columns[r] != kAllColumns) {
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
      if (!scale) row[r].total = factor[r] * Vec::sum(sum);
      if (kHalves == 2 && weights) {
        float* sums = weights + r * acc_dim;
        Vec::fma(sum, Vec(factor[r]), Vec::load(sums)).store(sums);
      }
    }
  }

  // Adds the weighted sums of one chunk over 64 columns to `sums`. In the first column the chunk is
  // the `bytes` bytes at `columns`. Pass kPass takes the low or the high nibbles, and (kParts =
  // 2) the lower or the upper eight bytes of every lane; it calls the next pass.
  template <int kRows, int kPass>
  KVQUANT_NOINLINE static void accumulate_chunk(const uint8_t* columns, RowStep row_bytes,
                                                int bytes, const Row* row, const Affine* affine,
                                                float* sums, size_t acc_dim) {
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
      float* out = sums + r * acc_dim;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int at = (4 * kNibble + kVecs * kPart + v) * Vec::kWidth;
        Vec dot = acc[r][v].result(), sum = Vec::load(out + at);
        if (affine) {
          dot = dot * Vec::load(affine->scale + at);
          sum = Vec::fma(Vec(row[r].total), Vec::load(affine->zero + at), sum);
        }
        Vec::fma(dot, factor, sum).store(out + at);
      }
    }
    if constexpr (kPass + 1 < kPasses)
      accumulate_chunk<kRows, kPass + 1>(columns, row_bytes, bytes, row, affine, sums, acc_dim);
  }
  // Each pass prefetches its share of the columns of a step.
  template <int kPass>
  static void prefetch_columns(const uint8_t* p, RowStep row_bytes) {
#pragma GCC unroll 8
    for (int i = kPass; i < Operand::kColumns; i += kPasses)
      prefetch_tile(p + i * row_bytes, row_bytes);
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
