// The loops over channels of a tile's keys; methods.h draws them.
#pragma once

#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// kBytes (8, 16, 24 or 32) bytes at p, and then zeros.
template <int kBytes>
inline __m256i load_bytes(const uint8_t* p) {
  if (kBytes == 32) return _mm256_loadu_si256((const __m256i*)p);
  if (kBytes == 8) return _mm256_zextsi128_si256(_mm_loadl_epi64((const __m128i*)p));
  const __m256i low = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return kBytes == 16 ? low
                      : _mm256_inserti128_si256(low, _mm_loadl_epi64((const __m128i*)(p + 16)), 1);
}

// Adds the products of vector i of the codes in kPairs vectors of bytes; `at`: where the weights of
// the first vector begin. sums[p * kRows + r] belongs to pair p and row r.
template <int i, int kPairs, int kRows, class F, class Row>
inline void dot_vector(const __m256i* bytes, const Row* row, int at, PairSums* sums) {
  Words codes[kPairs];
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) codes[p] = codes_of<i>(F{}, bytes[p]);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Words weights = Words::load(row[r].weights + at + i * Words::kWidth);
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) sums[p * kRows + r].add(codes[p], weights);
  }
}

// Adds the products of a chunk of kBytes bytes of kPairs pairs of columns; see KeyWeightMaker.
template <int kBytes, int kPairs, int kRows, class F, class Row>
inline void dot_chunk(const uint8_t* columns, RowStep row_bytes, const Row* row, int at,
                      PairSums* sums) {
#pragma GCC unroll 2
  for (int half = 0; half < (kBytes == 8 ? 1 : 2); ++half) {
    __m256i bytes[kPairs];
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      const uint8_t* column = columns + 2 * p * row_bytes;
      prefetch_tile(column + half * row_bytes, row_bytes);
      const __m256i a = load_bytes<kBytes>(column), b = load_bytes<kBytes>(column + row_bytes);
      bytes[p] = half ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
    }
    dot_vector<0, kPairs, kRows, F>(bytes, row, at, sums);
    dot_vector<1, kPairs, kRows, F>(bytes, row, at, sums);
    if constexpr (KeyWeightMaker<F>::kOfByte == 2) {
      dot_vector<2, kPairs, kRows, F>(bytes, row, at, sums);
      dot_vector<3, kPairs, kRows, F>(bytes, row, at, sums);
    }
    at += 2 * KeyWeightMaker<F>::kOfByte * Words::kWidth;
  }
}

// totals[r]: the dot products of 8 columns, whose channels begin at `columns`, with the weights of
// query row r from `at` on.
template <int kRows, class F, class Row>
inline void dot_columns(IntOperand<F>, const uint8_t* columns, RowStep row_bytes, int channels,
                        const Row* row, int at, Vec* totals) {
  constexpr int kPairs = kRows == 4 ? 2 : 4;
  constexpr int kChunkWeights = KeyWeightMaker<F>::room(1);
  const int bytes = channels / 16 * kBytesOf16<F>;
  __m256i quads[2][kRows];  // four columns, twice
#pragma GCC unroll 1
  for (int first = 0; first < 2; first += kPairs / 2, columns += 2 * kPairs * row_bytes) {
    PairSums sums[kPairs * kRows];
#pragma GCC unroll 8
    for (auto& s : sums) s.clear();
    const uint8_t* from = columns;
    int weights = at, left = bytes;
    for (; left >= 32; left -= 32, from += 32, weights += kChunkWeights)
      dot_chunk<32, kPairs, kRows, F>(from, row_bytes, row, weights, sums);
    if (left == 16) dot_chunk<16, kPairs, kRows, F>(from, row_bytes, row, weights, sums);
    if constexpr (kBytesOf16<F> == 8) {
      if (left == 8) dot_chunk<8, kPairs, kRows, F>(from, row_bytes, row, weights, sums);
      if (left == 24) dot_chunk<24, kPairs, kRows, F>(from, row_bytes, row, weights, sums);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; p += 2) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = sums[p * kRows + r].v, y = sums[(p + 1) * kRows + r].v;
        quads[first + p / 2][r] =
            _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m256i x = quads[0][r], y = quads[1][r];
    totals[r] = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_permute2x128_si256(x, y, 0x20),
                                                    _mm256_permute2x128_si256(x, y, 0x31)));
  }
}

// The same for fp8, as FP16 numbers, 16 channels at a time.
template <int kRows, class Row>
inline void dot_columns(E4M3Operand, const uint8_t* columns, RowStep row_bytes, int channels,
                        const Row* row, int at, Vec* totals) {
  // A pass computes kOfLane columns, from kOfLane * pass on, for the lower lane of its totals, and
  // the columns 4 further on for the upper lane.
  constexpr int kOfLane = 4 / kRows;
  const auto load = [&](int j, int c, Vec* out) {
    const uint8_t* column = columns + (j % kOfLane + j / kOfLane * 4) * row_bytes;
    E4M3Operand::load_columns(column + 2 * c, row_bytes, out);
  };
#pragma GCC unroll 1
  for (int pass = 0; pass < kRows; ++pass, columns += kOfLane * row_bytes) {
    FloatSums sums[8];
#pragma GCC unroll 8
    for (auto& s : sums) s.clear();
    for (int c = 0; c < channels; c += 16) {
#pragma GCC unroll 4
      for (int j = 0; j < 2 * kOfLane; j += 2) {
        Vec a[2], b[2];
        load(j, c, a);
        load(j + 1, c, b);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const Vec weights = Vec::load(row[r].weights + at + c + 8 * i);
            sums[j * kRows + r].add(a[i], weights);
            sums[(j + 1) * kRows + r].add(b[i], weights);
          }
        }
      }
    }
    totals[pass] = FloatSums::totals(sums);
  }
  transpose<kRows>(totals);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
