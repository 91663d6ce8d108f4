// `Vec` for AVX-512 (F, BW, VL, DQ): sixteen floats. The members are described in scalar/vec.h.
#pragma once

#include <immintrin.h>

#include "cpu/exp.h"
#include "kvquant/constants.h"
#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  Vec() = default;
  Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const BFloat16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  static __m128i bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static Vec decode(Signed8, const uint8_t* row, int c, int) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(row + c)));
  }
  static Vec decode(Unsigned8, const uint8_t* row, int c, int) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(row + c)));
  }
  // With exponent and mantissa shifted to where FP16 has them, the bits are the FP16 encoding of
  // 2^-8 times the element.
  static Vec decode(E4M3, const uint8_t* row, int c, int) {
    __m256i word = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes(row + c)), 8);
    __m256i magnitude = _mm256_srli_epi16(_mm256_and_si256(word, _mm256_set1_epi16(0x7f00)), 1);
    __m256i sign = _mm256_and_si256(word, _mm256_set1_epi16(int16_t(0x8000)));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign)), _mm512_set1_ps(256.0f));
  }
  static Vec decode(Nibble, const uint8_t* row, int c, int head_dim) {
    NibblePlace place = nibble_place(c, head_dim);
    __m128i nibbles;
    if (c % 32 == 0 && head_dim - c < 32) {  // a chunk of 16: its eight bytes hold all of it
      __m128i both = _mm_loadl_epi64((const __m128i*)(row + place.byte));
      nibbles = _mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4));
    } else {
      nibbles = _mm_srl_epi16(bytes(row + place.byte), _mm_cvtsi32_si128(place.shift));
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(nibbles, _mm_set1_epi8(15))));
  }
  static void store_low_bytes(__m512i x, uint8_t* p) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
  }
  void store_codes(Signed8, uint8_t* p) const { store_low_bytes(_mm512_cvtps_epi32(v), p); }
  void store_codes(E4M3, uint8_t* p) const {
    __m512i bits = _mm512_castps_si512(v);
    __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
    __m512i normal = _mm512_add_epi32(magnitude, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
    normal = _mm512_sub_epi32(_mm512_srli_epi32(normal, 20), _mm512_set1_epi32(120 << 3));
    __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(16384.0f));
    __m512i small = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
    __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
    store_low_bytes(_mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, is_small, small)), p);
  }

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
  // Compares the bits as unsigned integers. Among magnitudes the larger integer is the larger
  // float; infinity is above every finite float, and NaN above infinity.
  static Vec max_bits(Vec a, Vec b) {
    return _mm512_castsi512_ps(
        _mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
  }
  static Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
  static Vec round(Vec a) {
    return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^x = 2^floor(x) 2^r, the latter by a polynomial, with a relative error of 1.5e-7. `reduce` gives
  // r, and 0 for infinity; `scalef` rounds x down itself, and underflows to 0.
  static Vec exp2(Vec x) {
    const Vec r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF);
    const Vec y = polynomial(r, 1.0f, 6.931512951850891e-1f, 2.4016444385051727e-1f,
                             5.579991266131401e-2f, 9.017029777169228e-3f, 1.8671301659196615e-3f);
    return _mm512_scalef_ps(y.v, x.v);
  }
  // The same with a relative error of 7.5e-5; see exp.h.
  static Vec exp2_of_16_bits(Vec x) {
    const Vec r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF);
    const Vec y = polynomial(r, 9.9992519e-1f, 6.9583363e-1f, 2.2606727e-1f, 7.802428e-2f);
    return _mm512_scalef_ps(y.v, x.v);
  }
  static uint32_t less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
  static uint32_t finite(Vec a) { return less(abs(a), Vec(__builtin_inff())); }
  static uint32_t not_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q); }
  static Vec where(uint32_t bits, Vec a, Vec b) {
    return _mm512_mask_mov_ps(b.v, __mmask16(bits), a.v);
  }
  static Vec butterfly(Vec x, int stride) {
    __m512 y;
    switch (stride) {
      case 1:
        y = _mm512_permute_ps(x.v, 0xb1);
        return _mm512_mask_sub_ps(_mm512_add_ps(x.v, y), 0xaaaa, y, x.v);
      case 2:
        y = _mm512_permute_ps(x.v, 0x4e);
        return _mm512_mask_sub_ps(_mm512_add_ps(x.v, y), 0xcccc, y, x.v);
      case 4:
        y = _mm512_shuffle_f32x4(x.v, x.v, 0xb1);
        return _mm512_mask_sub_ps(_mm512_add_ps(x.v, y), 0xf0f0, y, x.v);
      default:
        y = _mm512_shuffle_f32x4(x.v, x.v, 0x4e);
        return _mm512_mask_sub_ps(_mm512_add_ps(x.v, y), 0xff00, y, x.v);
    }
  }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
  static float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
  static uint32_t largest_bits(Vec a) { return _mm512_reduce_max_epu32(_mm512_castps_si512(a.v)); }
  static Vec sum_each(const Vec* x) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i, x += 4) {
      __m512 ab =
          _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
      __m512 cd =
          _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
      four[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    __m512 eight[2];
    for (int i = 0; i < 2; ++i) {
      __m512 a = four[2 * i], b = four[2 * i + 1];
      eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
