// Dot products of quads, four bytes or two BF16 elements at a time, for AVX-512 VNNI and BF16.
//
// All sixteen quads of a vector are multiplied by the same quad of weights. Weights stand for
// queries or probabilities:
//
//              elements of a quad              weights
//   IntDot<n>  4 codes of 8 bits               integers of n bytes with a common float factor
//   PairDot    4 pairs of codes of 4 bits      integers of 12 bits with a common float factor
//   Bf16Dot<n> 2 in BF16 (bf16.h)              sums of n BF16 floats
//
// Weights are kept in planes: plane k has byte k, or BF16 summand k, of every weight. They are as
// exact as the queries with n = 2 for BF16 and FP16, and n = 3 for float; 12 bits suffice for BF16.
//
// The products are written as assembly, because GCC 12 moves the sums of the intrinsics through
// other registers and the stack.
#pragma once

#include "cpu/whole_tile.h"
#include "quads.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Adds to each sum the dot product of four unsigned and four signed bytes.
inline void add_product(__m512i& sum, __m512i without, __m512i with) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(without), "v"(with));
}

// Restores the order of quads after 32-bit integers were packed to words, and words to bytes.
// Packing leaves quad l of vector d in place d of lane l.
inline __m512i in_order(__m512i packed_twice) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, packed_twice);
}

// Plane 0 has the lowest bytes of the weights. Either the weights or the codes are signed.
template <int n, bool kSignedWeights>
struct IntDot {
  using Codes = Quads;
  static constexpr int kPlanes = n;
  static constexpr int kSums = n;        // vectors of sums
  static constexpr bool kRounds = true;  // weights are integers
  static constexpr int quads(int elements) { return elements / 4; }
  // A weight rounded to at most this fits in n bytes.
  static constexpr float kLargest = (kSignedWeights ? 127 : 255) << 8 * (n - 1);

  static float factor(const Largest& x) { return x.factor(kLargest); }
  static float inverse(float factor) { return factor == 0.0f ? 0.0f : 1.0f / factor; }

  // Rounds 64 floats of magnitude up to kLargest to weights, and stores plane k at quads + k *
  // stride; returns sums of the weights.
  static __m512i split(const Vec* x, int, int32_t* quads, int stride) {
    __m512i w[4];
    for (int i = 0; i < 4; ++i) w[i] = _mm512_cvtps_epi32(x[i].v);
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(w[0], w[1]), _mm512_add_epi32(w[2], w[3]));
    for (int k = 0; k + 2 < n; ++k, quads += stride) {
      __m512i low[4];
      for (int i = 0; i < 4; ++i) {
        low[i] = _mm512_and_si512(w[i], _mm512_set1_epi32(255));
        w[i] = kSignedWeights ? _mm512_srai_epi32(_mm512_add_epi32(w[i], _mm512_set1_epi32(128)), 8)
                              : _mm512_srli_epi32(w[i], 8);
      }
      store_bytes(pack(low[0], low[1]), pack(low[2], low[3]), quads);
    }
    __m512i ab = pack(w[0], w[1]), cd = pack(w[2], w[3]);
    const __m512i low = _mm512_set1_epi16(255);
    store_bytes(_mm512_and_si512(ab, low), _mm512_and_si512(cd, low), quads);
    if (kSignedWeights) {  // The low byte is signed too, so the high one is rounded, not truncated.
      ab = _mm512_add_epi16(ab, _mm512_set1_epi16(128));
      cd = _mm512_add_epi16(cd, _mm512_set1_epi16(128));
    }
    store_bytes(_mm512_srli_epi16(ab, 8), _mm512_srli_epi16(cd, 8), quads + stride);
    return sum;
  }
  static int64_t total(__m512i sums) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sums, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
  }

  __m512i sum[n];
  void clear() {
#pragma GCC unroll 3
    for (int k = 0; k < n; ++k) sum[k] = _mm512_setzero_si512();
  }
  // For one vector of codes: the weights are operands in memory.
  void add(Quads codes, const int32_t* quad, int stride) {
    static_assert(kSignedWeights, "the instruction takes its signed bytes from memory");
#pragma GCC unroll 3
    for (int k = 0; k < n; ++k) {
      asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[k]) : "v"(codes.v), "m"(quad[k * stride]));
    }
  }
  // For several vectors of codes: the weights are kept in registers, because a 512-bit broadcast
  // costs as much as a load.
  struct Weights {
    __m512i v[n];
    Weights(const int32_t* quad, int stride) {
#pragma GCC unroll 3
      for (int k = 0; k < n; ++k) v[k] = _mm512_set1_epi32(quad[k * stride]);
    }
  };
  void add(Quads codes, const Weights& weights) {
    static_assert(!kSignedWeights, "either the codes or the weights are signed");
#pragma GCC unroll 3
    for (int k = 0; k < n; ++k) {
      add_product(sum[k], weights.v[k], codes.v);
    }
  }
  // times * dot product - offset; `times` is 1 or 2, and `offset` is 0 unless `has_offset`. With n =
  // 2 and an offset the result is an integer below 2^31 (512 codes of -128 .. 127), so the steps
  // before it may wrap around. All else is added up as floats: the sums of one plane are below 2^24.
  Vec result(int times = 1, bool has_offset = false, int64_t offset = 0) const {
    if (n == 2 && has_offset) {
      __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sum[1], 8), sum[0]);
      if (times == 2) whole = _mm512_add_epi32(whole, whole);
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(whole, _mm512_set1_epi32(int32_t(offset))));
    }
    const Vec low = Vec::fma(float_of(sum[1]), Vec(256.0f), float_of(sum[0])) * Vec(float(times));
    if (n == 2) return low;
    const Vec high = float_of(sum[n - 1]) * Vec(65536.0f * float(times));
    return (high - Vec(float(offset))) + low;
  }

 private:
  static Vec float_of(__m512i x) { return _mm512_cvtepi32_ps(x); }
  static __m512i pack(__m512i a, __m512i b) {
    return kSignedWeights ? _mm512_packs_epi32(a, b) : _mm512_packus_epi32(a, b);
  }
  static void store_bytes(__m512i ab, __m512i cd, int32_t* quads) {
    _mm512_storeu_si512(quads, in_order(_mm512_packus_epi16(ab, cd)));
  }
};

// Makes the weights of 64 products x * y, as `Dot::split` does, but for the sums.
template <class Dot>
inline void split_products(const Vec* x, const Vec* y, int n, int32_t* quads, int stride) {
  Vec v[4];
  for (int i = 0; i < 4; ++i) v[i] = x[i] * y[i];
  Dot::split(v, n, quads, stride);
}

struct alignas(64) Indices {
  uint8_t byte[64];
  __m512i load() const { return _mm512_load_si512(byte); }
};
// The lowest bytes of the integers in two vectors, then their second bytes.
constexpr Indices lowest_bytes() {
  Indices x{};
  for (int i = 0; i < 32; ++i) {
    x.byte[i] = uint8_t(4 * i);
    x.byte[32 + i] = uint8_t(4 * i + 1);
  }
  return x;
}
inline constexpr Indices kLowestBytes = lowest_bytes();

// Weights of two signed bytes, in one instruction: added to 3 * 2^22 + 128, a product is rounded to
// an integer, which is in the lowest bits of the sum. With 128 more, the second byte is the high byte
// of the weight, rounded because the low one is signed; that is the lowest byte less 128.
template <>
inline void split_products<IntDot<2, true>>(const Vec* x, const Vec* y, int, int32_t* quads,
                                            int stride) {
  __m512i w[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    w[i] = _mm512_castps_si512(Vec::fma(x[i], y[i], Vec(12582912.0f + 128.0f)).v);
#ifdef __AVX512VBMI__
  const __m512i bytes = kLowestBytes.load();
  const __m512i minus_128 =
      _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(char(0x80)), 0);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i, quads += 8) {
    const __m512i both =
        _mm512_xor_si512(_mm512_permutex2var_epi8(w[2 * i], bytes, w[2 * i + 1]), minus_128);
    _mm256_storeu_si256((__m256i*)quads, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(quads + stride), _mm512_extracti64x4_epi64(both, 1));
  }
#else
  const __m512i low = _mm512_set1_epi32(255), second = _mm512_set1_epi32(0xff00);
  const auto pack = [](__m512i a, __m512i b, __m512i c, __m512i d) {
    return in_order(_mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d)));
  };
  __m512i a[4], b[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_and_si512(w[i], low);
    b[i] = _mm512_srli_epi32(_mm512_and_si512(w[i], second), 8);
  }
  _mm512_storeu_si512(quads,
                      _mm512_xor_si512(pack(a[0], a[1], a[2], a[3]), _mm512_set1_epi8(char(0x80))));
  _mm512_storeu_si512(quads + stride, pack(b[0], b[1], b[2], b[3]));
#endif
}

// Two codes c0 and c1 of four bits are one byte c0 + 16 c1 of a quad. Their weights w0 and w1 are
// made of three signed bytes, so three products suffice; two weights of two bytes would take four:
//
//   w0 = x + 16 y,  w1 = 16 x + z:   w0 c0 + w1 c1 = x (c0 + 16 c1) + y (16 c0) + z c1
//
// x is chosen so that it differs from w0 by a multiple of 16, and from w1 / 16 by at most 8.
struct PairDot {
  struct Codes {
    Quads both, low_up, high;
    Codes() = default;
    Codes(Quads pairs) : both(pairs), low_up(pairs.low_nibbles_up()), high(pairs.high_nibbles()) {}
  };
  static constexpr int kPlanes = 3, kSums = 1;
  static constexpr bool kRounds = true;
  static constexpr int quads(int elements) { return elements / 8; }
  static constexpr float kLargest = 16 * (127 - 8);

  static float factor(const Largest& x) { return x.factor(kLargest); }
  static float inverse(float factor) { return factor == 0.0f ? 0.0f : 1.0f / factor; }

  // The first 16 of 32 floats are paired with the other 16; if only 16 are left, the first 8 with
  // the other 8.
  static __m512i split(const Vec* floats, int n, int32_t* quads, int stride) {
    __m512i w[4];
    for (int i = 0; i < 4; ++i) w[i] = _mm512_cvtps_epi32(floats[i].v);
    if (n < 64 && n % 32) {
      __m512i &low = w[n / 32 * 2], &high = w[n / 32 * 2 + 1];
      high = _mm512_maskz_shuffle_i64x2(0x0f, low, low, 0xee);
      low = _mm512_maskz_mov_epi64(0x0f, low);
    }
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(w[0], w[1]), _mm512_add_epi32(w[2], w[3]));
    const __m512i w0 = _mm512_packs_epi32(w[0], w[2]), w1 = _mm512_packs_epi32(w[1], w[3]);
    const __m512i rest = _mm512_sub_epi16(w1, _mm512_slli_epi16(w0, 4));
    const __m512i k = _mm512_srai_epi16(_mm512_add_epi16(rest, _mm512_set1_epi16(128)), 8);
    const __m512i x = _mm512_add_epi16(w0, _mm512_slli_epi16(k, 4));
    const __m512i y = _mm512_sub_epi16(_mm512_setzero_si512(), k);
    const __m512i z = _mm512_sub_epi16(rest, _mm512_slli_epi16(k, 8));
    const __m512i xy = in_order(_mm512_packs_epi16(x, y)), zz = in_order(_mm512_packs_epi16(z, z));
    _mm256_storeu_si256((__m256i*)quads, _mm512_castsi512_si256(xy));
    _mm256_storeu_si256((__m256i*)(quads + stride), _mm512_extracti64x4_epi64(xy, 1));
    _mm256_storeu_si256((__m256i*)(quads + 2 * stride), _mm512_castsi512_si256(zz));
    return sum;
  }
  static int32_t total(__m512i sums) { return _mm512_reduce_add_epi32(sums); }

  __m512i sum;
  void clear() { sum = _mm512_setzero_si512(); }
  struct Weights {
    __m512i x, y, z;
    Weights(const int32_t* quad, int stride)
        : x(_mm512_set1_epi32(quad[0])),
          y(_mm512_set1_epi32(quad[stride])),
          z(_mm512_set1_epi32(quad[2 * stride])) {}
  };
  void add(const Codes& codes, const Weights& weights) {
    add_product(sum, codes.both.v, weights.x);
    add_product(sum, codes.low_up.v, weights.y);
    add_product(sum, codes.high.v, weights.z);
  }
  // As IntDot::result.
  Vec result(int times = 1, bool has_offset = false, int64_t offset = 0) const {
    __m512i x = times == 2 ? _mm512_add_epi32(sum, sum) : sum;
    if (has_offset) x = _mm512_sub_epi32(x, _mm512_set1_epi32(int32_t(offset)));
    return _mm512_cvtepi32_ps(x);
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
