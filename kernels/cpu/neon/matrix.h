// Products of matrices of bytes with the instruction `smmla`, in place of dot products.
//
//   two columns, or two channels     x     low  bytes of eight weights     four sums:  a low, a high,
//   a and b: eight codes of each           high bytes of eight weights                 b low, b high
//
// One instruction has 32 products, where `sdot` has 16. Each is given the same integers to add up, so
// the results are equal bit for bit.
#pragma once

#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

#ifndef __ARM_FEATURE_MATMUL_INT8
template <class Format>
using IntOperand = DotOperand<Format>;
#else

// Eight weights are stored as their low bytes, then their high bytes.
struct MatrixWeightMaker : WeightMaker {
  void make(Vec a, Vec b, int16_t* weights) {
    const Bytes x = bytes_of(a, b);
    auto* to = reinterpret_cast<int64_t*>(weights);
    vst1q_s64(to, vzip1q_s64(vreinterpretq_s64_s8(x.low), vreinterpretq_s64_s8(x.high)));
    vst1q_s64(to + 2, vzip2q_s64(vreinterpretq_s64_s8(x.low), vreinterpretq_s64_s8(x.high)));
  }
};

template <class F>
struct MatrixOperand : DotOperand<F> {
  using Maker = MatrixWeightMaker;
  using KeyMaker = InOrder<MatrixWeightMaker>;
  static constexpr int kKeyRows = 4;
};

// Four dot products from the sums of a, b and c, d.
inline int32x4_t whole(int32x4_t ab, int32x4_t cd) {
  return vaddq_s32(vuzp1q_s32(ab, cd), vshlq_n_s32(vuzp2q_s32(ab, cd), 8));
}

// Adds the products of eight channels of eight columns with the weights of each row, which begin at
// channel c.
template <int kRows, class Row>
inline void multiply_columns(const int8x16_t* codes, const Row* row, int c, int32x4_t (*sums)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const int8x16_t weights = vld1q_s8(reinterpret_cast<const int8_t*>(row[r].weights + c));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[r][i] = vmmlaq_s32(sums[r][i], codes[i], weights);
  }
}

// As in keys.h.
template <int kRows, class Format, class Row>
inline void dot_columns(MatrixOperand<Format>, const uint8_t* columns, RowStep row_bytes,
                        int channels, const Row* row, int begin, Vec* totals) {
  using Operand = MatrixOperand<Format>;
  constexpr bool kNibbles = std::is_same<Format, Nibble>::value;
  int32x4_t sums[kRows][4];
  for (auto& of_row : sums)
    for (int32x4_t& s : of_row) s = vdupq_n_s32(0);
  int c = 0;
  const uint8_t* p = columns;
  for (; c + 16 * (1 + kNibbles) <= channels; c += 16 * (1 + kNibbles), p += 16) {
    uint64x2_t halves[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* a = p + 2 * i * row_bytes;
      prefetch_tile(a, row_bytes);
      prefetch_tile(a + row_bytes, row_bytes);
      const uint64x2_t x = vreinterpretq_u64_u8(vld1q_u8(a));
      const uint64x2_t y = vreinterpretq_u64_u8(vld1q_u8(a + row_bytes));
      halves[0][i] = vzip1q_u64(x, y);
      halves[1][i] = vzip2q_u64(x, y);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int8x16_t codes[4];
#pragma GCC unroll 2
      for (int high = 0; high <= int(kNibbles); ++high) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          codes[i] = Operand::codes(vreinterpretq_u8_u64(halves[half][i]), high);
        multiply_columns<kRows>(codes, row, begin + c + 8 * half + 16 * high, sums);
      }
    }
  }
  if (c < channels) {  // a chunk of 16 channels: eight low nibbles, then eight high ones
    uint8x16_t bytes[4];
    for (int i = 0; i < 4; ++i)
      bytes[i] = vcombine_u8(vld1_u8(p + 2 * i * row_bytes), vld1_u8(p + (2 * i + 1) * row_bytes));
    for (int high = 0; high < 2; ++high) {
      int8x16_t codes[4];
      for (int i = 0; i < 4; ++i) codes[i] = Operand::codes(bytes[i], high);
      multiply_columns<kRows>(codes, row, begin + c + 8 * high, sums);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    totals[r] = floats_of(whole(sums[r][0], sums[r][1]), whole(sums[r][2], sums[r][3]));
}

// out[i]: the bytes of eight columns of channels 2 i and 2 i + 1, of which the first one's begins at p.
inline void load_eight(const uint8_t* p, int64_t row_bytes, uint8x16_t* out) {
  uint8x16_t x[4], y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8x8_t a = vld1_u8(p + i * row_bytes), b = vld1_u8(p + (i + 4) * row_bytes);
    x[i] = vcombine_u8(vzip1_u8(a, b), vzip2_u8(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = vzip1q_u8(x[i], x[i + 2]);
    y[2 * i + 1] = vzip2q_u8(x[i], x[i + 2]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = vzip1q_u8(y[i], y[i + 2]);
    out[2 * i + 1] = vzip2q_u8(y[i], y[i + 2]);
  }
}

// As in values.h.
template <int kRows, bool kHigh, class Format, class Row>
inline void sum_half(MatrixOperand<Format>, const uint8_t* columns, RowStep row_bytes,
                     int prefetched, const Row* row, Vec* out) {
  using Operand = MatrixOperand<Format>;
  int32x4_t sums[kRows][4];
  for (auto& of_row : sums)
    for (int32x4_t& s : of_row) s = vdupq_n_s32(0);
#pragma GCC unroll 1
  for (int i = 0; i < kTile; i += 8, columns += 8 * row_bytes) {
    prefetch_tile(columns + (prefetched + 4 * kHigh) * row_bytes, row_bytes);
    uint8x16_t bytes[4];
    load_eight(columns, row_bytes, bytes);
    int8x16_t codes[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) codes[k] = Operand::codes(bytes[k], kHigh);
    multiply_columns<kRows>(codes, row, i, sums);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    out[r] = floats_of(whole(sums[r][0], sums[r][1]), whole(sums[r][2], sums[r][3]));
}

template <class Format>
using IntOperand = MatrixOperand<Format>;
#endif

}  // namespace KVQUANT_ISA
}  // namespace kvquant
