// Codecs: how stored words become operands of m16n8k16, in registers.
//
//   chunk   16 bytes of a row (one token of one head)
//   word    what ldmatrix gives a lane (lane = 4 * g + t) of a chunk of 8 rows:
//             plain (keys):        bytes 4t .. 4t + 3 of row g
//             transposed (values): bytes 2g and 2g + 1 of row 2t, then of row 2t + 1
//   pair    a pair of numbers that split() takes out of a word. Part p of a row stands for the
//           channels channel(p, 0 .. 7): of keys a lane has channel(p, 2t) and channel(p, 2t + 1)
//           of one token, of values channel(p, g) of two tokens.
//
// So the pairs of both are operands as they are: pairs 2s and 2s + 1 are the B operand of step s
// along head_dim (queries are stored in the same order), and pair p of two words is that of the
// value columns channel(p, ..), the order in which the output is written.
//
// The trick that saves the arithmetic: a code in the low bits of an FP16 number is an exact
// subnormal number, code * 2^-24, and tensor cores take subnormals. No bias to subtract, nothing to
// convert; unit(p) is what one pair must be multiplied by, where it costs nothing (queries,
// output). Codes are FP16 for BF16 models too: exact in either, cheaper here.
//
//   codec        chunk   words -> pairs                           instructions for a word
//   SignedBytes  16 ch   even, odd bytes; code + 128              3
//   Unsigned..   16 ch   even, odd bytes                          2
//   Nibbles      32 ch   low nibbles of even, odd bytes, high ..  5
//   E4M3Bytes    16 ch   even, odd bytes; bits moved by one       6
//   Dense16      8 ch    as it is                                 0
#pragma once

#include "cuda/primitives.h"
#include "kvquant/formats.h"

namespace kvquant {

constexpr uint32_t kByteOfHalf = 0x00ff00ffu;

// What codecs of one byte per channel share: a chunk is 16 channels, its pairs the even and odd.
template <int kDim>
struct ByteRows {
  static constexpr bool kIsDense = false;
  static constexpr int kChannels = kDim, kRowBytes = kDim, kPairsOfWord = 2, kPairs = kDim / 8;
  static KVQUANT_FN constexpr int channel(int pair, int n) {
    return pair / 2 * 16 + 2 * n + pair % 2;
  }
  static KVQUANT_FN constexpr int pair_of(int channel) { return channel / 16 * 2 + channel % 2; }
  static KVQUANT_FN constexpr int n_of(int channel) { return channel % 16 / 2; }
};

template <int kDim>
struct UnsignedBytes : ByteRows<kDim> {
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr float unit(int) { return 0x1p24f; }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[2]) {
    pairs[0] = word & kByteOfHalf;
    pairs[1] = prmt(word, 0, 0x4341);
  }
};

template <int kDim>
struct SignedBytes : ByteRows<kDim> {
  static constexpr float kOffset = 128.0f;
  static KVQUANT_FN constexpr float unit(int) { return 0x1p24f; }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[2]) {
    UnsignedBytes<kDim>::split(word ^ 0x80808080u, pairs);
  }
  // Without the offset, for one more instruction a pair.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p24f; }
  static KVQUANT_DEVICE void split_centred(uint32_t word, uint32_t (&pairs)[2]) {
    split(word, pairs);
    for (uint32_t& pair : pairs) pair = hsub2(pair, 0x00800080u);
  }
};

// e4m3 has FP16's fields with one bit less of exponent and a bias that differs by 8.
template <int kDim>
struct E4M3Bytes : ByteRows<kDim> {
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr float unit(int) { return 0x1p8f; }
  static KVQUANT_DEVICE uint32_t upper_bytes(uint32_t word) {
    constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;
    return lop3<kAndOr>(word, 0x80008000u, word >> 1 & 0x3f803f80u);
  }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[2]) {
    pairs[0] = upper_bytes(word << 8);
    pairs[1] = upper_bytes(word);
  }
};

// In a last chunk of 16 channels half of the lanes hold numbers of no channel (-1): zeros, because
// rows are filled up with zeros in shared memory.
template <int kDim>
struct Nibbles {
  static constexpr bool kIsDense = false;
  static constexpr int kChannels = kDim, kRowBytes = kDim / 2;
  static constexpr int kPairsOfWord = 4, kPairs = (kDim + 31) / 32 * 4;
  static constexpr float kOffset = 7.5f;
  static KVQUANT_FN constexpr int half(int chunk) { return kDim - 32 * chunk < 32 ? 8 : 16; }
  static KVQUANT_FN constexpr int channel(int pair, int n) {
    const int chunk = pair / 4, j = 2 * n + pair % 2;
    return j < half(chunk) ? 32 * chunk + pair / 2 % 2 * half(chunk) + j : -1;
  }
  static KVQUANT_FN constexpr int pair_of(int channel) {
    const int chunk = channel / 32, j = channel % 32;
    return 4 * chunk + j / half(chunk) * 2 + j % 2;
  }
  static KVQUANT_FN constexpr int n_of(int channel) {
    return channel % 32 % half(channel / 32) / 2;
  }
  static KVQUANT_FN constexpr float unit(int pair) { return pair / 2 % 2 ? 0x1p20f : 0x1p24f; }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[4]) {
    const uint32_t odd = word >> 8;
    pairs[0] = word & 0x000f000fu;
    pairs[1] = odd & 0x000f000fu;
    pairs[2] = word & 0x00f000f0u;
    pairs[3] = odd & 0x00f000f0u;
  }
  // code - 7.5, for one more instruction a pair: 7.5 units are no FP16 number where a unit is the
  // smallest, so the codes of pairs 0 and 1 move up first, which is exact.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p20f; }
  static KVQUANT_DEVICE void split_centred(uint32_t word, uint32_t (&pairs)[4]) {
    split(word, pairs);
    pairs[0] = hfma2(pairs[0], 0x4c004c00u, 0x80788078u);
    pairs[1] = hfma2(pairs[1], 0x4c004c00u, 0x80788078u);
    pairs[2] = hsub2(pairs[2], 0x00780078u);
    pairs[3] = hsub2(pairs[3], 0x00780078u);
  }
};

// FP16 or BF16 as it is: a dense body, and the exact copies.
template <int kDim, bool kBFloat16>
struct Dense16 {
  static constexpr bool kIsDense = true, kIsBFloat16 = kBFloat16;
  static constexpr int kChannels = kDim, kRowBytes = 2 * kDim, kPairsOfWord = 1;
  static constexpr int kPairs = kDim / 8;
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr int channel(int pair, int n) { return 8 * pair + n; }
  static KVQUANT_FN constexpr int pair_of(int channel) { return channel / 8; }
  static KVQUANT_FN constexpr int n_of(int channel) { return channel % 8; }
  static KVQUANT_FN constexpr float unit(int) { return 1.0f; }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[1]) { pairs[0] = word; }
};

template <class Codec>
constexpr bool kIsE4M3 = false;
template <int kDim>
constexpr bool kIsE4M3<E4M3Bytes<kDim>> = true;

template <class Codec>
struct IsBFloat16 {
  static constexpr bool kValue = false;
};
template <int kDim>
struct IsBFloat16<Dense16<kDim, true>> {
  static constexpr bool kValue = true;
};

// Products of a codec's numbers: BF16 only where the numbers are.
template <class Codec>
KVQUANT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (IsBFloat16<Codec>::kValue) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
}
template <class Codec>
KVQUANT_DEVICE uint32_t pack(float low, float high) {
  return IsBFloat16<Codec>::kValue ? pack_bfloat162(low, high) : pack_half2(low, high);
}

// Rows in shared memory: whole chunks, an odd number of them apart, so that the 8 rows of an
// ldmatrix lie in different banks.
template <class Codec>
constexpr int kChunks = (Codec::kRowBytes + 15) / 16;
template <class Codec>
constexpr int kRowStride = 16 * (kChunks<Codec> | 1);

}  // namespace kvquant
