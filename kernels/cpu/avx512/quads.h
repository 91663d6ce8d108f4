// `Quads`: a vector of sixteen quads of four bytes, and the shuffles that transpose tiles.
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Quads {
  static constexpr int kCount = 16, kLanes = 4;  // a lane is 16 bytes
  __m512i v;

  Quads() = default;
  Quads(__m512i x) : v(x) {}
  explicit Quads(uint8_t byte) : v(_mm512_set1_epi8(char(byte))) {}

  static Quads load(const void* p) { return _mm512_loadu_si512(p); }
  static Quads load_first(const uint8_t* p, int bytes) {
    return _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - bytes), p);
  }
  friend Quads operator^(Quads a, Quads b) { return _mm512_xor_si512(a.v, b.v); }
  friend Quads operator&(Quads a, Quads b) { return _mm512_and_si512(a.v, b.v); }
  Quads low_nibbles() const { return *this & Quads(15); }
  Quads high_nibbles() const { return Quads(_mm512_srli_epi16(v, 4)).low_nibbles(); }
  Quads low_nibbles_up() const { return Quads(_mm512_slli_epi16(v, 4)) & Quads(0xf0); }
  // Bytes of two nibbles: the low (or high) nibble of a, plus 16 times the same nibble of b.
  static Quads pair_low(Quads a, Quads b) {
    return _mm512_ternarylogic_epi32(Quads(15).v, a.v, _mm512_slli_epi16(b.v, 4), 0xca);
  }
  static Quads pair_high(Quads a, Quads b) {
    return _mm512_ternarylogic_epi32(Quads(15).v, _mm512_srli_epi16(a.v, 4), b.v, 0xca);
  }
  // 16 (nibble - 8) as signed bytes, for the low and for the high nibbles.
  Quads low_centered() const { return Quads(_mm512_slli_epi16(v, 4)).high_centered(); }
  Quads high_centered() const {
    const Quads high(0xf0), sign(0x80);
    return _mm512_ternarylogic_epi32(v, high.v, sign.v, 0x6a);  // (v & high) ^ sign
  }

  // Lane l: the 16 bytes at p[l] + offset, or 8 bytes and then zeros if `half`.
  static Quads lanes(const uint8_t* const* p, int64_t offset, bool half) {
    const auto at = [&](int l) {
      const auto* from = (const __m128i*)(p[l] + offset);
      return half ? _mm_loadl_epi64(from) : _mm_loadu_si128(from);
    };
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  // Within each lane: quad i of x[j] becomes quad j of x[i].
  static void transpose_quads(Quads* x) {
    __m512i a = _mm512_unpacklo_epi32(x[0].v, x[1].v), b = _mm512_unpackhi_epi32(x[0].v, x[1].v);
    __m512i c = _mm512_unpacklo_epi32(x[2].v, x[3].v), d = _mm512_unpackhi_epi32(x[2].v, x[3].v);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
  }
  // Lane i of x[j] becomes lane j of x[i].
  static void transpose_lanes(Vec* x) {
    const __m512 a = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0x44);
    const __m512 b = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0xee);
    const __m512 c = _mm512_shuffle_f32x4(x[2].v, x[3].v, 0x44);
    const __m512 d = _mm512_shuffle_f32x4(x[2].v, x[3].v, 0xee);
    x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    x[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  // Within each lane: byte 8 part + 4i + j of x[k] becomes byte 4j + k of out[i], i < 2.
  static void interleave_bytes(const Quads* x, int part, Quads* out) {
    const auto unpack = [&](Quads a, Quads b) {
      return part ? _mm512_unpackhi_epi8(a.v, b.v) : _mm512_unpacklo_epi8(a.v, b.v);
    };
    const __m512i a = unpack(x[0], x[1]), b = unpack(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi16(a, b);
    out[1] = _mm512_unpackhi_epi16(a, b);
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
