// The queries of a block as operands in shared memory: FP16, and rotated if the keys are.
//
//   fragments   [step][lane][4 words, or 2]: lane 4g + t multiplies them by pairs 2 step and
//               2 step + 1 of the keys: rows g and g + 8, or row g alone, at the channels of the
//               first pair, then of the second. In float32 (float32.h): as many words of each term;
//               floats if scales of the channel grid come first, or if the keys are floats
//   factors     [kRows]: turns products of fragments and pairs into scores in units of log2
//   sums        [groups][kRows]: minus the amount that the keys' offset adds to a row's products
//
// The fragments are FP16 for BF16 models too. Each row is first multiplied by a power of two that
// brings its largest element to 2 .. 4. Then BF16 elements down to 2^-14 of the largest are exact,
// and products with scales of the channel grid are finite for scales up to 2^14, for instance of
// int4 keys with a range of 245000.
#pragma once

#include "cuda/columns.h"
#include "cuda/warp_row.h"
#include "kvquant/constants.h"

namespace kvquant {

template <class Keys>
struct Queries {
  using K = typename Keys::Codec;
  static constexpr int kSteps = kStepsOf<K>, kDim = K::kChannels;
  static constexpr int kTerms = kTermsOf<K>, kWords = kTerms * kRows / 4;
  static constexpr int kGroups = larger_of(Keys::kGroups, 1);
  static constexpr bool kHasOffset = Keys::kTokenScaled && K::kOffset != 0.0f;
  static constexpr int kFragments = 128 * kWords * kSteps;
  static constexpr int kBytes = kFragments + 4 * kRows * (1 + kGroups);

  SharedPtr<uint32_t> fragments;
  SharedPtr<float> factors, sums;

  KVQUANT_DEVICE explicit Queries(SharedPtr<uint8_t> memory)
      : fragments(shared_cast<uint32_t>(memory)),
        factors(shared_cast<float>(memory + kFragments)),
        sums(factors + kRows) {}

  KVQUANT_DEVICE void fragment(int step, uint32_t (&a)[8]) const {
    const auto all = shared_cast<Words4>(fragments) + (32 * step + lane_index()) * 2;
    const Words4 x = all[0], y = all[1];
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
    a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
  }
  KVQUANT_DEVICE void fragment(int step, uint32_t (&a)[4]) const {
    const Words4 words = shared_cast<Words4>(fragments)[32 * step + lane_index()];
    a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
  }
  KVQUANT_DEVICE void fragment(int step, uint32_t (&b)[2]) const {
    const Words2 words = shared_cast<Words2>(fragments)[32 * step + lane_index()];
    b[0] = words.x, b[1] = words.y;
  }

  // `[batch, num_heads, q_len, head_dim]`, with the strides of all axes but the last.
  struct Source {
    const uint8_t* data;
    const int64_t (&stride)[3];
  };

  // All threads of the block call this; the queries are complete after a block_barrier().
  template <int kWarps>
  KVQUANT_DEVICE void prepare(const Place& p, const Source& from) const {
    constexpr int kEach = (kRows + kWarps - 1) / kWarps;
    // A warp's rows are all in flight at once, unless they take too many registers.
    constexpr int kAtOnce = kDim <= 256 || kEach < 4 ? kEach : 4;
    const QueryRows block_rows(p);
    WarpRow<kDim> rows[kAtOnce];
    load_rows<kWarps>(p, from, block_rows, 0, rows);
    // Rows that do not exist, and elements that belong to no channel, are zeros.
    const auto words = shared_cast<Words4>(fragments);
    for (int i = thread_index(); i < kBytes / 16; i += 32 * kWarps)
      words[i] = Words4{0u, 0u, 0u, 0u};
    block_barrier();
    store_rows<kWarps>(p, block_rows, 0, rows);
#pragma unroll 1
    for (int first = kAtOnce; first < kEach; first += kAtOnce) {
      load_rows<kWarps>(p, from, block_rows, first, rows);
      store_rows<kWarps>(p, block_rows, first, rows);
    }
  }

 private:
  // Of the rows of this warp, those from `first` on.
  template <int kWarps, int kAtOnce>
  static KVQUANT_DEVICE void load_rows(const Place& p, const Source& from,
                                       const QueryRows& block_rows, int first,
                                       WarpRow<kDim> (&rows)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = warp_index() + (first + i) * kWarps;
      if (block_rows.exists(row)) load(p, from, block_rows, row, rows[i]);
    }
  }
  template <int kWarps, int kAtOnce>
  KVQUANT_DEVICE void store_rows(const Place& p, const QueryRows& block_rows, int first,
                                 WarpRow<kDim> (&rows)[kAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = warp_index() + (first + i) * kWarps;
      if (block_rows.exists(row)) store(p, row, rows[i]);
    }
  }
  static KVQUANT_DEVICE void load(const Place& p, const Source& from, const QueryRows& rows,
                                  int row, WarpRow<kDim>& x) {
    using Element = typename Choose<kIsFloat32, uint32_t, uint16_t>::Type;
    const auto* q = reinterpret_cast<const Element*>(from.data + p.batch() * from.stride[0] +
                                                     rows.head(row) * from.stride[1] +
                                                     rows.query(row) * from.stride[2]);
#pragma unroll
    for (int r = 0; r < x.kRounds; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = x.channel(r) + i;
        const uint32_t bits = c < kDim ? uint32_t(global_load(q + c)) : 0u;
        x.x[r][i] = kIsFloat32    ? bits_float(bits)
                    : kIsBFloat16 ? bfloat16_low(bits)
                                  : half_low(bits);
      }
    }
  }

  KVQUANT_DEVICE void store(const Place& p, int row, WarpRow<kDim>& x) const {
    if constexpr (Keys::kRotated) x.rotate();
    int exponent = 0;
    if constexpr (!K::kIsDense) {
      float largest = 0.0f;
#pragma unroll
      for (int r = 0; r < x.kRounds; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x.x[r][i]));
      }
      largest = warp_max(largest);
      exponent = largest == 0.0f ? 0 : 128 - int(float_bits(largest) >> 23);
      exponent = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
    }
    const float up = bits_float(uint32_t(127 + exponent) << 23);
    const float down = bits_float(uint32_t(127 - exponent) << 23);
    const auto halves = shared_cast<uint16_t>(fragments);
    float sum[WarpRow<kDim>::kRounds];
#pragma unroll
    for (int r = 0; r < x.kRounds; ++r) {
      const int c = x.channel(r);
      sum[r] = 0.0f;
      if (c >= kDim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = K::pair_of(c + i), n = K::n_of(c + i);
        const float relative = K::unit(pair) / K::unit(0);
        if constexpr (kIsFloat32) {
          store_float(row, c + i, x.x[r][i] * (up * relative));
          continue;
        }
        const uint32_t half = pack<K>(x.x[r][i] * (up * relative), 0.0f);
        const int lane = 4 * (row % 8) + n / 2;
        const int word = (32 * (pair / 2) + lane) * kWords + row / 8 + kWords / 2 * (pair % 2);
        halves[2 * word + n % 2] = uint16_t(half);
        sum[r] += half_low(half) / relative;
      }
    }
    if constexpr (kHasOffset) {
      for (int group = 0; group < kGroups; ++group) {
        float mine = 0.0f;
#pragma unroll
        for (int r = 0; r < x.kRounds; ++r) {
          mine += x.channel(r) / Keys::kGroup == group ? sum[r] : 0.0f;
        }
        mine = warp_sum(mine);
        if (lane_index() == 0) sums[group * kRows + row] = mine * (-K::kOffset / K::unit(0));
      }
    }
    if (lane_index() == 0) {
      factors[row] = down * K::unit(0) * float(p.a.scaling) * kLog2e;
    }
  }
  // Models in float32: one element of a fragment, which has 4 words, or 2, of each term.
  KVQUANT_DEVICE void store_float(int row, int channel, float x) const {
    constexpr int kOfTerm = kRows / 4;
    const auto words = shared_cast<float>(fragments);
    if constexpr (kIsFloats<K>) {
      const int lane = 4 * (row % 8) + channel % 4,
                word = row / 8 + kOfTerm / 2 * (channel / 4 % 2);
      words[(32 * (channel / 8) + lane) * kWords + word] = x;
    } else {
      const int pair = K::pair_of(channel), n = K::n_of(channel);
      const int at = (32 * (pair / 2) + 4 * (row % 8) + n / 2) * kWords,
                word = row / 8 + kOfTerm / 2 * (pair % 2);
      if constexpr (Keys::kChannelGrid) {
        words[at + 2 * word + n % 2] = x;
      } else {
        uint32_t first, second;
        split_halves(x, 0.0f, kSecondTerm, first, second);
        const auto halves = shared_cast<uint16_t>(fragments);
        halves[2 * (at + word) + n % 2] = uint16_t(first);
        halves[2 * (at + kOfTerm + word) + n % 2] = uint16_t(second);
      }
    }
  }
};

}  // namespace kvquant
