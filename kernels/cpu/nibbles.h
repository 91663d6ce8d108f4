// Codes of 4, 3 and 2 bits. Those of 3 and 2 bits are expanded to nibbles, a tile at a time, so that
// attention has one set of loops for all three. Their chunks are int4's, so this takes a shift and a
// mask for each word; int4's chunk of 32 channels has 16 bytes n, and
//
//   low bits    n[0..7] = x & 33.., n[8..15] = x >> 2 & 33..          x: 8 bytes
//   high bits   n[4k..4k+3] |= (h << 2 >> k) & 44.., for k = 0 .. 3   h: 4 bytes
//
// Every word keeps the order of its bytes, so the order in which a processor stores them is no
// matter.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstring>

#include "cpu/codecs.h"

// For steps of a loop that keep their constants in registers only if they are inlined.
#define KVQUANT_INLINED __attribute__((always_inline))
#define KVQUANT_INLINE inline KVQUANT_INLINED

namespace kvquant {
inline namespace KVQUANT_ISA {

inline bool is_packed(int64_t format) {
  return format == kInt4 || format == kInt3 || format == kInt2;
}

template <class Word>
Word load_word(const uint8_t* p) {
  Word x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class Word>
void store_word(Word x, uint8_t* p) {
  std::memcpy(p, &x, sizeof(x));
}

// The low bits of a chunk: two words of nibbles from a word at `from`, and back.
template <class Word>
void expand_low_bits(const uint8_t* from, uint8_t* nibbles) {
  const Word x = load_word<Word>(from), mask = Word(0x3333333333333333u);
  store_word<Word>(x & mask, nibbles);
  store_word<Word>(x >> 2 & mask, nibbles + sizeof(Word));
}
template <class Word>
void pack_low_bits(const uint8_t* nibbles, uint8_t* to) {
  const Word mask = Word(0x3333333333333333u);
  const Word a = load_word<Word>(nibbles) & mask,
             b = load_word<Word>(nibbles + sizeof(Word)) & mask;
  store_word<Word>(Word(a | b << 2), to);
}

// The high bits of a chunk: added to four words of nibbles from a word at `from`, and back.
template <class Word>
void expand_high_bits(const uint8_t* from, uint8_t* nibbles) {
  const Word x = load_word<Word>(from), mask = Word(0x4444444444444444u);
  for (int k = 0; k < 4; ++k, nibbles += sizeof(Word)) {
    const Word bits = Word(k < 2 ? x << (2 - k) : x >> (k - 2)) & mask;
    store_word<Word>(load_word<Word>(nibbles) | bits, nibbles);
  }
}
template <class Word>
void pack_high_bits(const uint8_t* nibbles, uint8_t* to) {
  Word x = 0;
  for (int k = 0; k < 4; ++k, nibbles += sizeof(Word))
    x = Word(x | (load_word<Word>(nibbles) >> 2 & Word(0x1111111111111111u)) << k);
  store_word<Word>(x, to);
}

// Packs codes 0 .. 15, one per byte, to nibbles.
inline void pack_nibbles(const uint8_t* codes, int head_dim, uint8_t* row) {
  for (int c = 0; c < head_dim; c += 32) {
    const int half = head_dim - c < 32 ? 8 : 16;
    for (int j = 0; j < half; ++j)
      row[c / 2 + j] = uint8_t(codes[c + j] | codes[c + half + j] << 4);
  }
}

// Packs codes, one per byte, to a row of a packed format.
inline void pack_codes(int64_t format, const uint8_t* codes, int head_dim, uint8_t* row) {
  if (format == kInt4) return pack_nibbles(codes, head_dim, row);
  uint8_t nibbles[kMaxHeadDim / 2];
  pack_nibbles(codes, head_dim, nibbles);
  uint8_t* high = row + head_dim / 4;
  const int whole = head_dim / 32 * 32;
  for (int c = 0; c < whole; c += 32) {
    pack_low_bits<uint64_t>(nibbles + c / 2, row + c / 4);
    if (format == kInt3) pack_high_bits<uint32_t>(nibbles + c / 2, high + c / 8);
  }
  if (whole < head_dim) {
    pack_low_bits<uint32_t>(nibbles + whole / 2, row + whole / 4);
    if (format == kInt3) pack_high_bits<uint16_t>(nibbles + whole / 2, high + whole / 8);
  }
}

// Expands `chunks` chunks of 32 channels; their high bits are at `high` if the codes have three bits.
#ifdef __AVX512VL__
template <bool kHigh>
KVQUANT_INLINE __m512i expanded(__m256i low, __m128i high) {
  const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i shift = _mm512_setr4_epi64(0, 2, 0, 2);
  const __m512i n = _mm512_and_si512(
      _mm512_srlv_epi64(_mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(low)), shift),
      _mm512_set1_epi8(0x33));
  if (!kHigh) return n;
  const __m512i four_times = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i h =
      _mm512_rolv_epi32(_mm512_permutexvar_epi32(four_times, _mm512_castsi128_si512(high)),
                        _mm512_setr4_epi32(2, 1, 0, 31));
  return _mm512_ternarylogic_epi32(h, _mm512_set1_epi8(0x44), n, 0xea);  // (h & 44..) | n
}
template <bool kHigh>
KVQUANT_INLINE void expand_chunks(const uint8_t* low, const uint8_t* high, int chunks,
                                  uint8_t* nibbles) {
  for (; chunks >= 4; chunks -= 4, low += 32, high += 16, nibbles += 64) {
    const __m128i h = kHigh ? _mm_loadu_si128((const __m128i*)high) : __m128i();
    const __m256i x = _mm256_loadu_si256((const __m256i*)low);
    _mm512_storeu_si512(nibbles, expanded<kHigh>(x, h));
  }
  if (chunks == 0) return;
  const __mmask8 rest = __mmask8((1 << chunks) - 1), twice = __mmask8((1 << 2 * chunks) - 1);
  const __m128i h = kHigh ? _mm_maskz_loadu_epi32(rest, high) : __m128i();
  _mm512_mask_storeu_epi64(nibbles, twice, expanded<kHigh>(_mm256_maskz_loadu_epi64(rest, low), h));
}
#elif defined(__AVX2__)
// Expands two chunks: x has the low bits of each twice, y the high bits of each four times.
template <bool kHigh>
KVQUANT_INLINE __m256i expanded(__m256i x, __m256i y) {
  const __m256i n = _mm256_and_si256(_mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 2, 0, 2)),
                                     _mm256_set1_epi8(0x33));
  if (!kHigh) return n;
  const __m256i h = _mm256_and_si256(
      _mm256_srlv_epi32(y, _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3)), _mm256_set1_epi8(0x11));
  return _mm256_or_si256(n, _mm256_slli_epi32(h, 2));
}
template <bool kHigh>
KVQUANT_INLINE void expand_chunks(const uint8_t* low, const uint8_t* high, int chunks,
                                  uint8_t* nibbles) {
  const auto four_times = [&](int i) {
    return _mm256_set1_epi32(kHigh ? int32_t(load_word<uint32_t>(high + i)) : 0);
  };
  for (; chunks >= 2; chunks -= 2, low += 16, high += 8, nibbles += 32) {
    const __m256i x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low));
    const __m256i y = _mm256_blend_epi32(four_times(0), four_times(4), 0xf0);
    _mm256_storeu_si256((__m256i*)nibbles, expanded<kHigh>(_mm256_permute4x64_epi64(x, 0x50), y));
  }
  if (chunks == 0) return;
  const __m256i x = _mm256_set1_epi64x(int64_t(load_word<uint64_t>(low)));
  _mm_storeu_si128((__m128i*)nibbles, _mm256_castsi256_si128(expanded<kHigh>(x, four_times(0))));
}
#else
template <bool kHigh>
void expand_chunks(const uint8_t* low, const uint8_t* high, int chunks, uint8_t* nibbles) {
  for (; chunks > 0; --chunks, low += 8, high += 4, nibbles += 16) {
    expand_low_bits<uint64_t>(low, nibbles);
    if (kHigh) expand_high_bits<uint32_t>(high, nibbles);
  }
}
#endif

// Expands n rows of whole chunks: kChunks of them, or `chunks` if that is 0. What lies `ahead` bytes
// further on is prefetched.
template <bool kHigh, int kChunks>
KVQUANT_INLINE void expand_rows(const uint8_t* row, int chunks, int n, int64_t ahead,
                                uint8_t* nibbles) {
  if (kChunks) chunks = kChunks;
  const int row_bytes = chunks * (kHigh ? 12 : 8);
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i, row += row_bytes, nibbles += chunks * 16) {
#pragma GCC unroll 2
    for (int b = 0; b < row_bytes; b += 64) __builtin_prefetch(row + ahead + b, 0, 2);
    expand_chunks<kHigh>(row, row + chunks * 8, chunks, nibbles);
  }
}

template <bool kHigh>
void expand_tile(const uint8_t* row, int head_dim, int64_t row_bytes, int64_t ahead, int n,
                 uint8_t* nibbles) {
  const int chunks = head_dim / 32;
  if (head_dim % 32) {
    for (int i = 0; i < n; ++i, row += row_bytes, nibbles += head_dim / 2) {
      const uint8_t* high = row + head_dim / 4;
      __builtin_prefetch(row + ahead, 0, 2);
      expand_chunks<kHigh>(row, high, chunks, nibbles);
      expand_low_bits<uint32_t>(row + chunks * 8, nibbles + chunks * 16);
      if (kHigh) expand_high_bits<uint16_t>(high + chunks * 4, nibbles + chunks * 16);
    }
  } else if (!kHigh) {  // nothing lies between the chunks of all rows
    const int eights = n * chunks / 8, rest = n * chunks % 8;
    expand_rows<false, 8>(row, 8, eights, ahead, nibbles);
    expand_chunks<false>(row + eights * 64, row, rest, nibbles + eights * 128);
  } else if (chunks == 4) {
    expand_rows<kHigh, 4>(row, 4, n, ahead, nibbles);
  } else if (chunks == 3) {
    expand_rows<kHigh, 3>(row, 3, n, ahead, nibbles);
  } else if (chunks == 2) {
    expand_rows<kHigh, 2>(row, 2, n, ahead, nibbles);
  } else {
    expand_rows<kHigh, 0>(row, chunks, n, ahead, nibbles);
  }
}

// Room for a tile of nibbles.
constexpr int kTileBytes = kTile * kMaxHeadDim / 2;

// Whether a body has codes of 2 or 3 bits, which attention reads as nibbles.
inline bool is_expanded(const Body& body) { return body.format == kInt3 || body.format == kInt2; }

// The body; if it has codes of 2 or 3 bits, one of nibbles instead, of which only the n columns from
// `first` on, which are expanded to `tile`, can be read.
inline Body in_nibbles(const Body& body, int64_t first, int n, uint8_t* tile) {
  if (!is_expanded(body)) return body;
  Body expanded = body;
  expanded.row_bytes = body.head_dim / 2;
  expanded.ahead = 0;  // the tile is prefetched as it is expanded
  expanded.data = tile - first * expanded.row_bytes;
  const uint8_t* row = body.data + first * body.row_bytes;
  if (body.format == kInt3)
    expand_tile<true>(row, body.head_dim, body.row_bytes, body.ahead, n, tile);
  if (body.format == kInt2)
    expand_tile<false>(row, body.head_dim, body.row_bytes, body.ahead, n, tile);
  return expanded;
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
