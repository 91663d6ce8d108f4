// Dot products of fp8 codes: table lookups (VBMI) expand them to BF16, and AVX-512 BF16 multiplies.
#pragma once

#include "methods.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Four elements take two quads: elements 0 and 2 are in the first, 1 and 3 in the second. A weight
// is the sum of n BF16 floats; each is the remainder that the ones before it leave, rounded.
template <int n>
struct Bf16Dot {
  using Codes = Quads;
  static constexpr int kPlanes = n, kSums = 1;
  static constexpr bool kRounds = false;
  static constexpr int quads(int elements) { return elements / 2; }

  static float factor(const Largest&) { return 1.0f; }
  static float inverse(float) { return 1.0f; }
  static __m512i split(const Vec* x, int, int32_t* quads, int stride) {
    for (int i = 0; i < 2; ++i, x += 2, quads += 16) {
      __m512 a = x[0].v, b = x[1].v;
      for (int k = 0; k < n; ++k) {
        const __m512i elements = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        store(elements, quads + k * stride);
        a = _mm512_sub_ps(a, float_of(_mm512_castsi512_si256(elements)));
        b = _mm512_sub_ps(b, float_of(_mm512_extracti64x4_epi64(elements, 1)));
      }
    }
    return _mm512_setzero_si512();
  }
  static int32_t total(__m512i) { return 0; }

  __m512 sum;
  void clear() { sum = _mm512_setzero_ps(); }
  struct Weights {
    __m512i v[n];
    Weights(const int32_t* quad, int stride) {
#pragma GCC unroll 3
      for (int k = 0; k < n; ++k) v[k] = _mm512_set1_epi32(quad[k * stride]);
    }
  };
  void add(Quads elements, const Weights& weights) {
#pragma GCC unroll 3
    for (int k = 0; k < n; ++k) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(elements.v), "v"(weights.v[k]));
    }
  }
  Vec result(int = 1, bool = false, int64_t = 0) const { return sum; }

 private:
  static __m512 float_of(__m256i elements) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(elements), 16));
  }
  static void store(__m512i elements, int32_t* quads) {
    elements = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(elements, 0xd8), 0xd8);
    _mm512_storeu_si512(quads, elements);
  }
};

// E4M3 codes as BF16, exactly. Both bytes come from tables of the 128 magnitudes.
struct E4M3ToBf16 {
  __m512i high[2], low[2];

  E4M3ToBf16() {
    static const Table table;
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm512_load_si512(table.high + 64 * i);
      low[i] = _mm512_load_si512(table.low + 64 * i);
    }
  }
  // Elements 0 and 2 of each quad go to out[0], 1 and 3 to out[1].
  void expand(Quads codes, Quads* out) const {
    const __m512i sign = _mm512_and_si512(codes.v, _mm512_set1_epi8(char(0x80)));
    const __m512i h = _mm512_or_si512(_mm512_permutex2var_epi8(high[0], codes.v, high[1]), sign);
    const __m512i l = _mm512_permutex2var_epi8(low[0], codes.v, low[1]);
    const __m512i even = _mm512_set1_epi16(0x00ff);
    out[0] = _mm512_or_si512(_mm512_and_si512(even, l), _mm512_slli_epi16(h, 8));
    out[1] = _mm512_or_si512(_mm512_srli_epi16(l, 8), _mm512_andnot_si512(even, h));
  }

 private:
  struct Table {
    alignas(64) uint8_t high[128], low[128];
    Table() {
      for (int i = 0; i < 128; ++i) {
        const uint32_t bits = bits_of(e4m3_to_float(uint8_t(i))) >> 16;
        high[i] = uint8_t(bits >> 8);
        low[i] = uint8_t(bits);
      }
    }
  };
};

template <int kPlanes>
struct E4M3Operand : FourColumns<Bf16Dot<kPlanes>> {
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 2, kTimes = 1;
  static constexpr bool kHasOffset = false;
  const E4M3ToBf16 table;
  template <int = 0>
  void expand(Quads x, Quads* out) const {
    table.expand(x, out);
  }
};

// One plane suffices for BF16 queries that are neither rotated nor multiplied by scales.
inline KeyMethod bf16_key_method(const KvquantSide& side, int64_t dtype) {
  if (side.format != kFp8 || !takes_tiles(side)) return quad_key_method(side, dtype);
  const bool as_they_are = side.grid != kChannelGrid && !side.rotate;
  if (dtype == kFloat32) return quad_keys<E4M3Operand<3>>();
  if (dtype == kBFloat16 && as_they_are) return quad_keys<E4M3Operand<1>>();
  return quad_keys<E4M3Operand<2>>();
}
inline ValueMethod bf16_value_method(const KvquantSide& side, int64_t dtype) {
  if (side.format != kFp8 || !takes_tiles(side)) return quad_value_method(side, dtype);
  return dtype == kFloat32 ? quad_values<E4M3Operand<3>>() : quad_values<E4M3Operand<2>>();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
