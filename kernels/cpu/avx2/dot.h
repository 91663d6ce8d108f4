// Dot products for AVX2 and AVX-VNNI. Weights stand for queries or probabilities:
//
//                        codes become              weights
//   IntOperand<Format>  16 integers of 16 bits    integers of 16 bits with a common float factor
//   E4M3Operand          8 floats                  floats
//
// AVX2 multiplies and adds pairs of 16-bit integers (vpmaddwd), and adds that to a sum in a second
// instruction; AVX-VNNI does both in one (vpdpwssd), with the same result. For fp8 floats are as
// fast: in units of its smallest code an element has 18 bits and a sign, so integers would take
// two products each.
//
// No sum overflows: 256 codes of 0 .. 255 times 32767 are less than 2^31, and longer rows, of up to
// 512 codes, have weights of half the size; a tile of values has 64 codes of -127 .. 127. Weights of
// 14 bits and a sign are as exact as BF16 and FP16 queries, but not as float ones.
#pragma once

#include <immintrin.h>

#include "cpu/whole_tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Words {
  static constexpr int kWidth = 16;
  __m256i v;

  Words() = default;
  Words(__m256i x) : v(x) {}

  static Words load(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  // The two integers at p, eight times.
  static Words pair(const int16_t* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss((const float*)p));
  }
  Words low_nibbles() const { return _mm256_and_si256(v, _mm256_set1_epi16(15)); }
  // For words below 256.
  Words high_nibbles() const { return _mm256_srli_epi16(v, 4); }
};

// Widens the even bytes (i = 0) or the odd ones (i = 1) of a vector to words.
template <int i>
inline Words codes_of(Unsigned8, __m256i x) {
  return i ? _mm256_srli_epi16(x, 8) : _mm256_and_si256(x, _mm256_set1_epi16(255));
}
template <int i>
inline Words codes_of(Signed8, __m256i x) {
  return _mm256_srai_epi16(i ? x : _mm256_slli_epi16(x, 8), 8);
}
// The low nibbles of the even bytes (i = 0), their high nibbles, and those of the odd bytes.
template <int i>
inline Words codes_of(Nibble, __m256i x) {
  const Words high = _mm256_srli_epi16(x, 4 * i);
  return i == 3 ? high : high.low_nibbles();
}

// Widens sixteen bytes to words; a byte of two nibbles is unsigned.
inline Words widen(Signed8, __m128i bytes) { return _mm256_cvtepi8_epi16(bytes); }
inline Words widen(Unsigned8, __m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }
inline Words widen(Nibble, __m128i bytes) { return _mm256_cvtepu8_epi16(bytes); }

// Pairs each channel of column a with the same channel of column b, eight channels in each of
// out[0] and out[1]. They are the channels of 16 bytes in order, or the low nibbles and then the
// high nibbles of 8 bytes.
template <class Format>
inline void load_pairs(Format format, const uint8_t* a, const uint8_t* b, Words* out) {
  const __m128i x = _mm_loadu_si128((const __m128i*)a), y = _mm_loadu_si128((const __m128i*)b);
  out[0] = widen(format, _mm_unpacklo_epi8(x, y));
  out[1] = widen(format, _mm_unpackhi_epi8(x, y));
}
inline void load_pairs(Nibble format, const uint8_t* a, const uint8_t* b, Words* out) {
  const __m128i x = _mm_loadl_epi64((const __m128i*)a), y = _mm_loadl_epi64((const __m128i*)b);
  const Words bytes = widen(format, _mm_unpacklo_epi8(x, y));
  out[0] = bytes.low_nibbles();
  out[1] = bytes.high_nibbles();
}

// Eight 32-bit sums; `add` adds a product of pairs to each.
struct PairSums {
  __m256i v;

  void clear() { v = _mm256_setzero_si256(); }
  void add(Words codes, Words weights) {
#ifdef __AVXVNNI__
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(v) : "x"(codes.v), "xm"(weights.v));
#else
    const __m256i products = _mm256_madd_epi16(codes.v, weights.v);
    asm("vpaddd %1, %0, %0" : "+x"(v) : "x"(products));
#endif
  }
  Vec to_floats() const { return _mm256_cvtepi32_ps(v); }
};

// Turns n vectors whose 128-bit lanes hold 4 / n floats of each of n query rows, column by column,
// into one vector for each row, with 4 columns in a lane.
template <int n>
inline void transpose(Vec* x) {
  if (n == 2) {
    const __m256 a = x[0].v, b = x[1].v;
    x[0] = _mm256_shuffle_ps(a, b, 0x88);
    x[1] = _mm256_shuffle_ps(a, b, 0xdd);
  }
  if (n == 4) {
    const __m256 a = _mm256_unpacklo_ps(x[0].v, x[1].v), b = _mm256_unpackhi_ps(x[0].v, x[1].v);
    const __m256 c = _mm256_unpacklo_ps(x[2].v, x[3].v), d = _mm256_unpackhi_ps(x[2].v, x[3].v);
    x[0] = _mm256_shuffle_ps(a, c, 0x44);
    x[1] = _mm256_shuffle_ps(a, c, 0xee);
    x[2] = _mm256_shuffle_ps(b, d, 0x44);
    x[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
}

// Rounds floats to weights, in their order, and adds the weights up.
struct WeightMaker {
  // The largest weight for sums over n codes.
  static constexpr float largest(int n) { return n > 256 ? 16383.0f : 32767.0f; }
  __m256i sums = _mm256_setzero_si256();

  // What floats are multiplied by before they are rounded to weights.
  static float inverse(float factor) { return factor == 0.0f ? 0.0f : 1.0f / factor; }
  void make(Vec a, Vec b, int16_t* weights) {
    _mm256_storeu_si256((__m256i*)weights, _mm256_permute4x64_epi64(
                                               _mm256_packs_epi32(integers(a), integers(b)), 0xd8));
  }
  float sum() const { return Vec::sum(_mm256_cvtepi32_ps(sums)); }

 protected:
  __m256i integers(Vec a) {
    const __m256i x = _mm256_cvtps_epi32(a.v);
    sums = _mm256_add_epi32(sums, x);
    return x;
  }
};

// Makes the weights of a query row in the order of the codes that are multiplied at once. Two
// columns a and b are read 32 bytes at a time, and their quads of bytes interleaved:
//
//   bytes of a lane    a0 a1 a2 a3 b0 b1 b2 b3 a4 a5 a6 a7 b4 b5 b6 b7    (then a8 .. b15)
//   its even bytes     a0    a2    b0    b2    a4    a6    b4    b6       words
//   weights            w0    w2    w0    w2    w4    w6    w4    w6       words
//
// So each pair of words belongs to one column, and a vector has four sums of each. A chunk of int8 is
// 32 channels and four vectors: the even and the odd bytes of the first, and of the last eight bytes
// of each lane. One of nibbles is 64 channels and eight vectors. Bytes beyond a group have weights 0.
template <class F>
struct KeyWeightMaker : WeightMaker {
  static constexpr int kOfByte = 16 / kBytesOf16<F>;  // codes
  static constexpr int kChunk = 32 * kOfByte;         // channels
  static constexpr int kRoom = 4;                     // weights for a channel, at most

  // How many weights a group of n channels has.
  static constexpr int room(int n) { return (n + kChunk - 1) / kChunk * 2 * kChunk; }

  // Makes the weights of a group of n channels; x(c): the floats from channel c on.
  template <class Floats>
  void make_group(Floats x, int n, int16_t* weights) {
    int c = 0;
    for (; c + kChunk <= n; c += kChunk, weights += 2 * kChunk) {
      make_chunk(weights, [&](int lane, int half, int nibble) {
        return x(c + lane * kChunk / 2 + 16 * nibble + 8 * half);
      });
    }
    if (c == n) return;
    // If only eight bytes of nibbles are left, they hold 16 channels.
    make_chunk(weights, [&](int lane, int half, int nibble) {
      const int first = c + lane * kChunk / 2;
      if (kOfByte == 2 && n - first == 16) return half ? Vec(0.0f) : x(first + 8 * nibble);
      return n > first ? x(first + 16 * nibble + 8 * half) : Vec(0.0f);
    });
  }

 private:
  // eight(lane, half, nibble): the floats of the channels whose codes are in half of the 16 bytes of a
  // lane.
  template <class Eight>
  void make_chunk(int16_t* weights, Eight eight) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, weights += 2 * kOfByte * Words::kWidth) {
#pragma GCC unroll 2
      for (int nibble = 0; nibble < kOfByte; ++nibble)
        make_pairs(eight(0, half, nibble), eight(1, half, nibble),
                   weights + nibble * Words::kWidth);
    }
  }
  void make_pairs(Vec a, Vec b, int16_t* weights) {
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(integers(a), integers(b)), 0xd8);
    const __m256i even = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 0, 1, 4, 5, 8, 9, 12, 13, 8, 9, 12, 13));
    const __m256i odd = _mm256_add_epi8(even, _mm256_set1_epi8(2));
    _mm256_storeu_si256((__m256i*)weights, _mm256_shuffle_epi8(w, even));
    _mm256_storeu_si256((__m256i*)(weights + kOfByte * Words::kWidth), _mm256_shuffle_epi8(w, odd));
  }
};

// What keys.h and values.h ask of an operand is drawn here.
template <class F>
struct IntOperand {
  using Format = F;
  using Vector = Words;    // of codes or weights
  using Weight = int16_t;  // as stored
  using Sums = PairSums;   // eight
  using Maker = WeightMaker;
  using KeyMaker = KeyWeightMaker<F>;
  static constexpr int kBytes = kBytesOf16<F>, kKeyRows = 4;
  static constexpr int kColumns = 2;  // whose values are multiplied at once
  static constexpr float kBias = 0.0f;
  static constexpr bool kRounds = true;  // the weights are integers

  // The float that all weights are multiples of, for sums over n codes.
  static float factor(const Largest& x, int n) { return x.factor(WeightMaker::largest(n)); }
  // Loads 16 channels of kColumns columns, eight of them in each of out[0] and out[1].
  static void load_columns(const uint8_t* p, int64_t row_bytes, Words* out) {
    load_pairs(F{}, p, p + row_bytes, out);
  }
  // The weights of kColumns columns, for load_columns.
  static Words broadcast(const int16_t* p) { return Words::pair(p); }
};

// Eight sums of floats, with the members of PairSums.
struct FloatSums {
  Vec v;

  void clear() { v = Vec(0.0f); }
  // As assembly, because GCC loads a weight again for each column instead of keeping it (6 %).
  void add(Vec codes, Vec weights) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(v.v) : "x"(codes.v), "x"(weights.v));
  }
  Vec to_floats() const { return v; }
  static Vec totals(const FloatSums* x) {
    Vec v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = x[i].v;
    return Vec::sum_each(v);
  }
};

// The loops read elements in FP16, 2^-8 times as large, so that a conversion is all that is left.
struct E4M3Operand {
  using Format = E4M3;
  using Vector = Vec;
  using Weight = float;
  using Sums = FloatSums;
  using Maker = FloatMaker;
  using KeyMaker = InOrder<FloatMaker>;
  static constexpr int kBytes = 32, kKeyRows = 4, kColumns = 1;
  static constexpr float kBias = 0.0f;
  static constexpr bool kRounds = false;

  static float factor(const Largest&, int) { return 256.0f; }
  static void load_columns(const uint8_t* p, int64_t, Vec* out) {
    out[0] = Vec::load((const Half*)p);
    out[1] = Vec::load((const Half*)p + 8);
  }
  static Vec broadcast(const float* p) { return Vec(*p); }
};

// Converts a tile of fp8. With exponent and mantissa where FP16 has them, the bits are those of an
// FP16 number, subnormal where the element is. The sign is extended to 16 bits, and shifted to bits
// 14 and 15; 14 is cleared.
inline Tile tile_of(E4M3Operand, const Body& body, int64_t first, int n, uint8_t* room) {
  const uint8_t* from = body.data + first * body.row_bytes;
  const int64_t bytes = n * body.row_bytes, whole = kTile * body.row_bytes;
  uint8_t* to = room;
#pragma GCC unroll 4
  for (int64_t i = 0; i < bytes; i += 16, to += 32) {
    __builtin_prefetch(from + i + body.ahead, 0, 2);
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + i)));
    _mm256_store_si256((__m256i*)to, _mm256_and_si256(_mm256_slli_epi16(wide, 7),
                                                      _mm256_set1_epi16(int16_t(0xbfff))));
  }
  std::memset(to, 0, size_t(2 * (whole - bytes)));
  return {room, {2 * body.row_bytes, 0}};
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
