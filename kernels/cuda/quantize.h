// The formats of hf_kvquant/quantization.py, an octet at a time, every step one IEEE rounding.
#pragma once

#include "cuda/octet.h"

namespace kvquant {

template <int kFormat>
struct FormatOf;
template <>
struct FormatOf<kInt8> {
  using Token = Signed8;
  using Channel = Unsigned8;
};
template <>
struct FormatOf<kFp8> {
  using Token = E4M3;
  using Channel = E4M3;
};
template <>
struct FormatOf<kInt4> {
  using Token = Nibble;
  using Channel = Nibble;
};
template <>
struct FormatOf<kInt3> {
  using Token = ThreeBits;
  using Channel = ThreeBits;
};
template <>
struct FormatOf<kInt2> {
  using Token = TwoBits;
  using Channel = TwoBits;
};

KVQUANT_DEVICE float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
KVQUANT_DEVICE float half_of(uint16_t bits) { return half_low(bits); }
KVQUANT_DEVICE uint16_t to_half_bits(float x) { return uint16_t(pack_half2(x, 0.0f)); }

// In a float of this size the last bit counts 1, so a sum with it is rounded to an integer.
constexpr float kLastBitIsOne = 12582912.0f;  // 1.5 * 2^23

// Rounds eight floats within the reach of the format, half to even, to a byte each; NaN: any byte.
template <class Format>
KVQUANT_DEVICE Words2 encode(const float (&y)[8]) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (Format::kIsFloat) {
#if KVQUANT_ARCH >= 890
      words[i] = pack_e4m3x2(y[4 * i], y[4 * i + 1]) | pack_e4m3x2(y[4 * i + 2], y[4 * i + 3])
                                                           << 16;
#else
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i] |= uint32_t(float_to_e4m3(y[4 * i + j])) << 8 * j;
#endif
    } else {
      uint32_t code[4];  // in the low byte
#pragma unroll
      for (int j = 0; j < 4; ++j) code[j] = float_bits(add_rn(y[4 * i + j], kLastBitIsOne));
      words[i] = prmt(prmt(code[0], code[1], 0x0040), prmt(code[2], code[3], 0x0040), 0x5410);
    }
  }
  return {words[0], words[1]};
}

// Writes codes of two or three bits. Four lanes, o = 0 .. 3, share the bytes of a chunk: lane o has
// bits 2 o and 2 o + 1 of each. A byte of the plane of high bits has a bit of the lane's first four
// codes, then one of the last four. Lanes 0 and 1 store the low bits, lane 2 the high bits.
template <int kBits, int kHeadDim>
KVQUANT_DEVICE void store_planes(Words2 codes, uint8_t* row, bool write, int octet) {
  static_assert(kHeadDim % 32 == 0, "chunks of 32 channels");
  const int o = octet % 4, chunk = octet / 4;
  const bool odd = o % 2 != 0;
  const uint32_t x = (codes.x & 0x03030303u) << 2 * o, y = (codes.y & 0x03030303u) << 2 * o;
  uint32_t low = (odd ? y : x) | shuffle_xor(odd ? x : y, 1);
  low |= shuffle_xor(low, 2);
  if (write && o < 2) global_store(reinterpret_cast<uint32_t*>(row + 8 * chunk + 4 * o), low);
  if constexpr (kBits == 3) {
    uint32_t high = ((codes.x >> 2 & 0x01010101u) | (codes.y >> 1 & 0x02020202u)) << 2 * o;
    high |= shuffle_xor(high, 1);
    high |= shuffle_xor(high, 2);
    uint8_t* to = row + kHeadDim / 4 + 4 * chunk;
    if (write && o == 2) global_store(reinterpret_cast<uint32_t*>(to), high);
  }
}

// Writes the codes of a lane's octet `part` to its row of the cache if `write`. Every lane of the
// warp must call this, because lanes that share bytes exchange codes.
template <int kBits, int kHeadDim>
KVQUANT_DEVICE void store_codes(Words2 codes, uint8_t* row, bool write, int part) {
  const int octet = Row<kHeadDim>::octet(part);
  if constexpr (kBits < 4) {
    store_planes<kBits, kHeadDim>(codes, row, write, octet);
  } else if constexpr (kBits == 4) {
    // The octet that shares its bytes with ours is half a chunk away. Each of the two lanes stores
    // four of the eight bytes.
    const NibblePlace place = nibble_place(8 * octet, kHeadDim);
    const bool high = place.shift != 0, short_chunk = kHeadDim - 8 * octet / 32 * 32 < 32;
    const uint32_t theirs = shuffle(high ? codes.x : codes.y, lane_index() ^ (short_chunk ? 1 : 2));
    const uint32_t bytes = high ? theirs | codes.y << 4 : codes.x | theirs << 4;
    uint32_t* to = reinterpret_cast<uint32_t*>(row + place.byte + (high ? 4 : 0));
    if (write) global_store(to, bytes);
  } else {
    if (write) global_store(reinterpret_cast<Words2*>(row + 8 * octet), codes);
  }
}

// Token grid: the FP16 scale of a group with this largest magnitude; NaN if an element is not
// finite.
template <class Format>
KVQUANT_DEVICE uint16_t token_scale(float magnitude) {
  constexpr float kToScale = float(Format::kTokenSpan / double(Format::kReach));
  if (!is_finite(magnitude)) return kFp16Nan;
  return to_half_bits(fminf(mul_rn(magnitude, kToScale), kFp16Max));
}
template <class Format>
KVQUANT_DEVICE Words2 token_codes(const float (&x)[8], uint16_t scale) {
  constexpr bool kPacked = Format::kMidpoint != 0.0f;
  constexpr float kLow = kPacked ? 0.0f : -Format::kReach;
  constexpr float kHigh = kPacked ? Format::kLevels : Format::kReach;
  const float r = rcp_rn(half_of(scale));
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] = mul_rn(x[i], r);
    if (kPacked) y[i] = add_rn(y[i], Format::kMidpoint);
    y[i] = clamp(y[i], kLow, kHigh);
  }
  const Words2 codes = encode<Format>(y);
  // A scale of 0 or NaN: the code of 0.
  constexpr uint32_t kZeros = uint32_t(Format::kMidpoint + 0.5f) * 0x01010101u;
  return is_finite(r) ? codes : Words2{kZeros, kZeros};
}

// Channel grid: the statistics of one channel in a block, and the scale and codes that follow.
template <class Format>
struct Channel {
  static constexpr bool kSymmetric = Format::kLevels == 0.0f;
  float low = bits_float(0x7f800000u);
  float high = kSymmetric ? 0.0f : -bits_float(0x7f800000u);  // symmetric: the largest magnitude

  KVQUANT_DEVICE void count(float x) {
    high = fmaxf(high, kSymmetric ? fabsf(x) : x);
    if (!kSymmetric) low = fminf(low, x);
  }
  KVQUANT_DEVICE void merge(float their_low, float their_high) {
    if (!kSymmetric) low = fminf(low, their_low);
    high = fmaxf(high, their_high);
  }
  // FP16 bits, as those of the scale.
  KVQUANT_DEVICE uint16_t zero_point() const {
    return to_half_bits(clamp(end(low, margin()), -kFp16Max, kFp16Max));
  }
  KVQUANT_DEVICE uint16_t scale(float zero) const {
    constexpr float kToScale = float(1.0 / double(kSymmetric ? Format::kReach : Format::kLevels));
    const float range = kSymmetric ? high : sub_rn(end(high, -margin()), zero);
    return to_half_bits(clamp(mul_rn(range, kToScale), -kFp16Max, kFp16Max));
  }
  // The factor of code(). It is 0 if the scale has no finite reciprocal, so that every code is 0.
  KVQUANT_DEVICE static float reciprocal(uint16_t scale) {
    const float r = rcp_rn(half_of(scale));
    return is_finite(fabsf(r)) ? r : 0.0f;
  }
  // The code of x before rounding; 0 for NaN. With zero points fmaxf replaces NaN, which infinity
  // times 0 gives too.
  KVQUANT_DEVICE static float code(float x, float zero, float r) {
    if (!kSymmetric) return clamp(mul_rn(sub_rn(x, zero), r), 0.0f, Format::kLevels);
    if (x != x || r == 0.0f) return 0.0f;  // +0; -0 has another code
    return clamp(mul_rn(x, r), -Format::kReach, Format::kReach);
  }

 private:
  // An end of the range, moved by `by`; 0 if nothing was counted. Adding 0 turns -0 into +0: the
  // minimum of both zeros may be either one, and the bytes must not depend on it.
  KVQUANT_DEVICE float end(float x, float by = 0.0f) const {
    if (!is_finite(low)) return 0.0f;
    const float exact = add_rn(x, 0.0f);
    return Format::kChannelSpan < 1.0 ? add_rn(exact, by) : exact;
  }
  // What codes leave out at either end. The difference of two products, because high - low may
  // overflow.
  KVQUANT_DEVICE float margin() const {
    constexpr float kPart = float((1.0 - Format::kChannelSpan) / 2.0);
    return sub_rn(mul_rn(end(high), kPart), mul_rn(end(low), kPart));
  }
};

}  // namespace kvquant
