// `Vec` for AVX2 with FMA and F16C: eight floats. The members are described in scalar/vec.h.
#pragma once

#include <immintrin.h>

#include "cpu/exp.h"
#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  Vec() = default;
  Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const BFloat16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const {
    __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    rounded = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
  }

  static __m128i bytes(const uint8_t* p) { return _mm_loadl_epi64((const __m128i*)p); }
  static Vec decode(Signed8, const uint8_t* row, int c, int) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(row + c)));
  }
  static Vec decode(Unsigned8, const uint8_t* row, int c, int) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(row + c)));
  }
  // With exponent and mantissa shifted to where FP16 has them, the bits are the FP16 encoding of
  // 2^-8 times the element.
  static Vec decode(E4M3, const uint8_t* row, int c, int) {
    __m128i word = _mm_slli_epi16(_mm_cvtepu8_epi16(bytes(row + c)), 8);
    __m128i magnitude = _mm_srli_epi16(_mm_and_si128(word, _mm_set1_epi16(0x7f00)), 1);
    __m128i sign = _mm_and_si128(word, _mm_set1_epi16(int16_t(0x8000)));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(magnitude, sign)), _mm256_set1_ps(256.0f));
  }
  static Vec decode(Nibble, const uint8_t* row, int c, int head_dim) {
    NibblePlace place = nibble_place(c, head_dim);
    __m128i nibbles = _mm_srl_epi16(bytes(row + place.byte), _mm_cvtsi32_si128(place.shift));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(nibbles, _mm_set1_epi8(15))));
  }
  static void store_low_bytes(__m256i x, uint8_t* p) {
    __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                     4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i packed = _mm256_shuffle_epi8(x, order);
    __m128i low = _mm256_castsi256_si128(packed), high = _mm256_extracti128_si256(packed, 1);
    _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(low, high));
  }
  void store_codes(Signed8, uint8_t* p) const { store_low_bytes(_mm256_cvtps_epi32(v), p); }
  void store_codes(E4M3, uint8_t* p) const {
    __m256i bits = _mm256_castps_si256(v);
    __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
    __m256i normal = _mm256_add_epi32(magnitude, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
    normal = _mm256_sub_epi32(_mm256_srli_epi32(normal, 20), _mm256_set1_epi32(120 << 3));
    __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(16384.0f));
    __m256i small = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
    __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude);
    store_low_bytes(_mm256_or_si256(sign, _mm256_blendv_epi8(normal, small, is_small)), p);
  }

  friend Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
  // Compares the bits as unsigned integers. Among magnitudes the larger integer is the larger
  // float; infinity is above every finite float, and NaN above infinity.
  static Vec max_bits(Vec a, Vec b) {
    return _mm256_castsi256_ps(
        _mm256_max_epu32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
  }
  static Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
  static Vec round(Vec a) {
    return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec exp2(Vec x) { return exp2_of(x); }
  static Vec exp2_of_16_bits(Vec x) { return rough_exp2_of(x); }
  // a * 2^n for integral n, where a and the product are normal numbers, or NaN where a is.
  static Vec scale(Vec a, Vec n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent));
  }
  static uint32_t less(Vec a, Vec b) { return bits(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)); }
  static uint32_t finite(Vec a) { return less(abs(a), Vec(__builtin_inff())); }
  static uint32_t not_nan(Vec a) { return bits(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q)); }
  static Vec where(uint32_t bits, Vec a, Vec b) {
    __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(mask));
  }
  static Vec butterfly(Vec x, int stride) {
    __m256 y;
    switch (stride) {
      case 1:
        y = _mm256_permute_ps(x.v, 0xb1);
        return _mm256_blend_ps(_mm256_add_ps(x.v, y), _mm256_sub_ps(y, x.v), 0xaa);
      case 2:
        y = _mm256_permute_ps(x.v, 0x4e);
        return _mm256_blend_ps(_mm256_add_ps(x.v, y), _mm256_sub_ps(y, x.v), 0xcc);
      default:
        y = _mm256_permute2f128_ps(x.v, x.v, 1);
        return _mm256_blend_ps(_mm256_add_ps(x.v, y), _mm256_sub_ps(y, x.v), 0xf0);
    }
  }
  static float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float largest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static uint32_t largest_bits(Vec a) {
    const __m256i x = _mm256_castps_si256(a.v);
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(most));
  }
  static Vec sum_each(const Vec* x) {
    __m256 four[2];
    for (int i = 0; i < 2; ++i, x += 4) {
      __m256 ab =
          _mm256_add_ps(_mm256_unpacklo_ps(x[0].v, x[1].v), _mm256_unpackhi_ps(x[0].v, x[1].v));
      __m256 cd =
          _mm256_add_ps(_mm256_unpacklo_ps(x[2].v, x[3].v), _mm256_unpackhi_ps(x[2].v, x[3].v));
      four[i] = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                         _mm256_permute2f128_ps(four[0], four[1], 0x31));
  }

 private:
  static uint32_t bits(__m256 mask) { return uint32_t(_mm256_movemask_ps(mask)); }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
