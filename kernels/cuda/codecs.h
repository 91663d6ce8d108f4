// Codecs: how stored words become operands of m16n8k16, in registers.
//
//   chunk   16 bytes of a row (one token of one head)
//   word    the 4 bytes that ldmatrix gives a lane (4 * g + t) from a chunk of 8 rows:
//             plain (keys):        bytes 4t .. 4t + 3 of row g
//             transposed (values): bytes 2g and 2g + 1 of row 2t, then of row 2t + 1
//   pair    a lane pair: the two FP16 elements that a lane gets when split() takes a word apart.
//           Pair p of a row stands for eight channels, channel(p, 0) .. channel(p, 7), spread over
//           the lanes:
//             keys:    a lane has channel(p, 2t) and channel(p, 2t + 1) of one token
//             values:  a lane has channel(p, g) of two tokens
//
// Lane pairs are operands as they are. Pairs 2s and 2s + 1 of a key are the B operand of step s
// along head_dim; queries are stored in the same order. Pair p of two words of values is the B
// operand for the output channels channel(p, ..); the output is written in this order.
//
// The trick that saves the arithmetic: an integer code in the low bits of an FP16 word is an exact
// subnormal number, code * 2^-24, and tensor cores multiply subnormals exactly. Nothing has to be
// converted, and no bias subtracted; the products of pair p are multiplied by unit(p) where that
// costs nothing, in the queries or the output. BF16 models use FP16 codes as well: both are exact,
// and FP16 takes fewer instructions.
//
// A codec has kUnits units: kPairsOfUnit pairs have the first one, as many the next one, and so on
// in turn.
//
//   codec          channels of a chunk   pairs of a word                  instructions of a word
//   SignedBytes    16                    even, odd bytes; code + 128      3
//   UnsignedBytes  16                    even, odd bytes                  2
//   Nibbles        32                    low nibbles of even, odd bytes;  5
//                                        high nibbles of even, odd bytes
//   BitPairs       64                    bits 0, 1 of even, odd bytes;    9
//                                        2, 3; second part: 4, 5; 6, 7
//   BitTriples     64                    bits 0, 1 and a high bit; 4, 5;  14
//                                        second part: 2, 3; 6, 7
//   E4M3Bytes      16                    even, odd bytes, shifted by 1    6
//                                        converted, from sm_89 on         3
//   Dense16        8                     the word                         0
//   Dense32        4                     keys: the word, channel t of a   0
//                                        pair of four
//
// A row of BitTriples has two planes, low and high bits. Its word is two words: that of a chunk of low
// bits, and the high bits of the same channels (Tile::load).
//
// Models in float32 have Dense32 in place of Dense16; codes of the token grid are then without
// their offset (Centred): sums of codes that are 128 too large have lost bits that are wanted.
#pragma once

#include "cuda/float32.h"
#include "kvquant/formats.h"

namespace kvquant {

constexpr uint32_t kByteOfHalf = 0x00ff00ffu;

// The base of codecs whose words are those of ldmatrix, split at once.
struct OneWord {
  using Word = uint32_t;
  static constexpr int kParts = 1;
};

// The base of codecs of one byte per channel: a word has a pair of even and one of odd channels.
template <int kDim>
struct ByteRows : OneWord {
  static constexpr bool kIsDense = false;
  static constexpr int kChannels = kDim, kRowBytes = kDim, kPairsOfWord = 2, kPairs = kDim / 8;
  static constexpr int kUnits = 1, kPairsOfUnit = 2;
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
  // Without the offset, which takes one more instruction per pair.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p24f; }
  static KVQUANT_DEVICE void split_centred(uint32_t word, uint32_t (&pairs)[2]) {
    split(word, pairs);
    for (uint32_t& pair : pairs) pair = hsub2(pair, 0x00800080u);
  }
};

// E4M3 has the fields of FP16, with one bit less of exponent and a bias that is 8 smaller.
template <int kDim>
struct E4M3Bytes : ByteRows<kDim> {
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr float unit(int) { return KVQUANT_ARCH >= 890 ? 1.0f : 0x1p8f; }
  static KVQUANT_DEVICE uint32_t upper_bytes(uint32_t word) {
    constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;
    return lop3<kAndOr>(word, 0x80008000u, word >> 1 & 0x3f803f80u);
  }
  // Finite whatever is stored, also for the codes of NaN.
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[2]) {
    pairs[0] = upper_bytes(word << 8);
    pairs[1] = upper_bytes(word);
#if KVQUANT_ARCH >= 890
    for (uint32_t& pair : pairs) pair = hmul2(pair, 0x5c005c00u);  // 2^8
#endif
  }
#if KVQUANT_ARCH >= 890
  static KVQUANT_DEVICE void convert(uint32_t word, uint32_t (&pairs)[2]) {
    const uint32_t bytes = prmt(word, 0, 0x3120);
    pairs[0] = e4m3x2_low(bytes);
    pairs[1] = e4m3x2_high(bytes);
  }
#endif
};

// If the last chunk has only 16 channels, half of the lanes hold elements that belong to no channel
// (-1). They are zeros, because rows are padded with zeros in shared memory.
template <int kDim>
struct Nibbles : OneWord {
  static constexpr bool kIsDense = false;
  static constexpr int kChannels = kDim, kRowBytes = kDim / 2;
  static constexpr int kPairsOfWord = 4, kPairs = (kDim + 31) / 32 * 4;
  static constexpr int kUnits = 2, kPairsOfUnit = 2;
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
  // code - 7.5, which takes one more instruction per pair. In pairs 0 and 1 a code of 1 is the
  // smallest FP16 value, so 7.5 cannot be represented; they are multiplied by 16 first, exactly.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p20f; }
  static KVQUANT_DEVICE void split_centred(uint32_t word, uint32_t (&pairs)[4]) {
    split(word, pairs);
    pairs[0] = hfma2(pairs[0], 0x4c004c00u, 0x80788078u);
    pairs[1] = hfma2(pairs[1], 0x4c004c00u, 0x80788078u);
    pairs[2] = hsub2(pairs[2], 0x00780078u);
    pairs[3] = hsub2(pairs[3], 0x00780078u);
  }
};

// The base of codecs with two bits of each of four channels in a byte. Byte b of a chunk belongs to the
// channels 32 * (b / 8) + b % 8 + 8 * j, j = 0 .. 3. A word is split in two parts, because registers
// are scarce; a part has the pairs of two j, kOfPart apart from those of the other part. The eight
// channels of a pair lie in both halves of a chunk, so groups of the token grid have whole chunks.
template <int kDim, int kOfPart>
struct FewBits {
  static_assert(kDim % 64 == 0, "head_dim: a multiple of 64 for codes of 2 or 3 bits");
  static constexpr bool kIsDense = false;
  static constexpr int kChannels = kDim, kParts = 2, kPairsOfWord = 4, kPairs = kDim / 8;
  static KVQUANT_FN constexpr int channel(int pair, int n) {
    const int j = kOfPart * (pair / 4 % 2) + (3 - kOfPart) * (pair / 2 % 2);
    return pair / 8 * 64 + n / 4 * 32 + 8 * j + 2 * (n % 4) + pair % 2;
  }
  static KVQUANT_FN constexpr int pair_of(int channel) {
    const int j = channel / 8 % 4, part = kOfPart == 2 ? j / 2 : j % 2;
    return channel / 64 * 8 + 4 * part + 2 * (kOfPart == 2 ? j % 2 : j / 2) + channel % 2;
  }
  static KVQUANT_FN constexpr int n_of(int channel) {
    return channel / 32 % 2 * 4 + channel % 8 / 2;
  }
};

template <int kDim>
struct BitPairs : FewBits<kDim, 2> {
  using Word = uint32_t;
  static constexpr int kRowBytes = kDim / 4, kUnits = 4, kPairsOfUnit = 2;
  static constexpr float kOffset = 1.5f;
  static KVQUANT_FN constexpr float unit(int pair) {
    return pair / 4 % 2 ? (pair / 2 % 2 ? 0x1p18f : 0x1p20f) : pair / 2 % 2 ? 0x1p22f : 0x1p24f;
  }
  static KVQUANT_DEVICE void split(uint32_t word, int part, uint32_t (&pairs)[4]) {
    const uint32_t odd = word >> 8, first = 0x00030003u << 4 * part, second = first << 2;
    pairs[0] = word & first;
    pairs[1] = odd & first;
    pairs[2] = word & second;
    pairs[3] = odd & second;
  }
  // code - 1.5, all in the unit of the last pairs.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p18f; }
  static KVQUANT_DEVICE void split_centred(uint32_t word, int part, uint32_t (&pairs)[4]) {
    constexpr uint32_t kUp[4] = {0x54005400u, 0x4c004c00u, 0x44004400u, 0x3c003c00u};  // 64 .. 1
    split(word, part, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = hfma2(pairs[i], kUp[2 * part + i / 2], 0x80608060u);
  }
};

// Low bits, and the high bits of the channels j = 1 and 3 where the third bit of a nibble is. Those of
// j = 0 and 2 are two bits lower.
struct LowAndHigh {
  uint32_t low, high;
};
template <int kDim>
struct BitTriples : FewBits<kDim, 1> {
  using Word = LowAndHigh;
  static constexpr int kRowBytes = kDim / 8 * 3, kUnits = 2, kPairsOfUnit = 2;
  static constexpr float kOffset = 3.5f;
  static KVQUANT_FN constexpr float unit(int pair) { return pair / 2 % 2 ? 0x1p20f : 0x1p24f; }
  static KVQUANT_DEVICE void split(LowAndHigh word, int part, uint32_t (&pairs)[4]) {
    constexpr int kSelect = (0xf0 & 0xaa) | (0xcc & ~0xaa);
    const uint32_t nibbles = part == 0 ? lop3<kSelect>(word.low, word.high << 2, 0x33333333u)
                                       : lop3<kSelect>(word.low >> 2, word.high, 0x33333333u);
    const uint32_t odd = nibbles >> 8;
    pairs[0] = nibbles & 0x00070007u;
    pairs[1] = odd & 0x00070007u;
    pairs[2] = nibbles & 0x00700070u;
    pairs[3] = odd & 0x00700070u;
  }
  // code - 3.5, as Nibbles has it.
  static KVQUANT_FN constexpr float unit_centred(int) { return 0x1p20f; }
  static KVQUANT_DEVICE void split_centred(LowAndHigh word, int part, uint32_t (&pairs)[4]) {
    split(word, part, pairs);
    pairs[0] = hfma2(pairs[0], 0x4c004c00u, 0x80388038u);
    pairs[1] = hfma2(pairs[1], 0x4c004c00u, 0x80388038u);
    pairs[2] = hsub2(pairs[2], 0x00380038u);
    pairs[3] = hsub2(pairs[3], 0x00380038u);
  }
};

// Elements that are not quantized, of kBytes each. A step along head_dim (kStepsOf) takes 16 channels
// of FP16 or BF16, and 8 of float32.
template <int kDim, int kBytes>
struct DenseRow : OneWord {
  static constexpr bool kIsDense = true;
  static constexpr int kChannels = kDim, kRowBytes = kBytes * kDim, kPairsOfWord = 1;
  static constexpr int kPairs = kDim / 8, kUnits = 1, kPairsOfUnit = 2;
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr int channel(int pair, int n) { return 8 * pair + n; }
  static KVQUANT_FN constexpr int pair_of(int channel) { return channel / 8; }
  static KVQUANT_FN constexpr int n_of(int channel) { return channel % 8; }
  static KVQUANT_FN constexpr float unit(int) { return 1.0f; }
  static KVQUANT_DEVICE void split(uint32_t word, uint32_t (&pairs)[1]) { pairs[0] = word; }
};

// FP16 or BF16 elements: a body that is not quantized, and the exact copies.
template <int kDim, bool kBFloat16>
struct Dense16 : DenseRow<kDim, 2> {
  static constexpr bool kIsBFloat16 = kBFloat16;
};

// The same of models in float32. float_values.h has the products of values.
template <int kDim>
struct Dense32 : DenseRow<kDim, 4> {};

// Codes without their offset.
template <class Codec>
struct Centred : Codec {
  static constexpr float kOffset = 0.0f;
  static KVQUANT_FN constexpr float unit(int pair) { return Codec::unit_centred(pair); }
  template <class... Rest>
  static KVQUANT_DEVICE void split(typename Codec::Word word, Rest&&... part_and_pairs) {
    Codec::split_centred(word, part_and_pairs...);
  }
};

template <class Codec>
constexpr bool kIsFloats = false;
template <int kDim>
constexpr bool kIsFloats<Dense32<kDim>> = true;

// The products along head_dim of a row of keys.
template <class Codec>
constexpr int kStepsOf = kIsFloats<Codec> ? Codec::kPairs : Codec::kPairs / 2;

template <class Codec>
constexpr bool kIsE4M3 = false;
template <int kDim>
constexpr bool kIsE4M3<E4M3Bytes<kDim>> = true;

// kAllSeen: no column of the word is hidden from a row, so NaN may stay NaN.
template <class Codec, bool kAllSeen>
KVQUANT_DEVICE void split(typename Codec::Word word, int part,
                          uint32_t (&pairs)[Codec::kPairsOfWord]) {
  if constexpr (KVQUANT_ARCH >= 890 && kAllSeen && kIsE4M3<Codec>)
    Codec::convert(word, pairs);
  else if constexpr (Codec::kParts > 1)
    Codec::split(word, part, pairs);
  else
    Codec::split(word, pairs);
}

template <class Codec>
struct IsBFloat16 {
  static constexpr bool kValue = false;
};
template <int kDim>
struct IsBFloat16<Dense16<kDim, true>> {
  static constexpr bool kValue = true;
};

// Multiplies operands of a codec, in float32 or BF16 if its elements are, else in FP16.
template <class Codec>
KVQUANT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsFloats<Codec>) {
    multiply_float32(c, a, b);
  } else if constexpr (IsBFloat16<Codec>::kValue) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
}
template <class Codec>
KVQUANT_DEVICE uint32_t pack(float low, float high) {
  return IsBFloat16<Codec>::kValue ? pack_bfloat162(low, high) : pack_half2(low, high);
}

template <class Word>
constexpr bool kIsLowAndHigh = false;
template <>
constexpr bool kIsLowAndHigh<LowAndHigh> = true;
// A row has a plane of high bits behind its low bits, which are the first plane.
template <class Codec>
constexpr bool kHasHighBits = kIsLowAndHigh<typename Codec::Word>;
template <class Codec>
constexpr int kFirstPlane = kHasHighBits<Codec> ? Codec::kChannels / 4 : Codec::kRowBytes;

// The chunks whose words are split. In shared memory a row is padded to whole chunks, and rows are an
// odd number of chunks apart, so that the 8 rows of an ldmatrix lie in different banks.
template <class Codec>
constexpr int kChunks = (kFirstPlane<Codec> + 15) / 16;
template <class Codec>
constexpr int kRowChunks = (Codec::kRowBytes + 15) / 16;
template <class Codec>
constexpr int kRowStride = 16 * (kRowChunks<Codec> | 1);

}  // namespace kvquant
