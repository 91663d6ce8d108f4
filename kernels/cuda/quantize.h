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

// Writes the codes of a lane's octet `part` to its row of the cache if `write`. Every lane of the
// warp must call this, because the lanes of nibbles exchange halves.
template <class Format, int kHeadDim>
KVQUANT_DEVICE void store_codes(Words2 codes, uint8_t* row, bool write, int part) {
  const int octet = Row<kHeadDim>::octet(part);
  if constexpr (Format::kMidpoint != 0.0f) {
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
  constexpr float kToScale = float(1.0 / double(Format::kReach));
  if (!is_finite(magnitude)) return kFp16Nan;
  return to_half_bits(fminf(mul_rn(magnitude, kToScale), kFp16Max));
}
template <class Format>
KVQUANT_DEVICE Words2 token_codes(const float (&x)[8], uint16_t scale) {
  constexpr bool kNibble = Format::kMidpoint != 0.0f;
  constexpr float kLow = kNibble ? 0.0f : -Format::kReach, kHigh = kNibble ? 15.0f : Format::kReach;
  const float r = rcp_rn(half_of(scale));
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] = mul_rn(x[i], r);
    if (kNibble) y[i] = add_rn(y[i], Format::kMidpoint);
    y[i] = clamp(y[i], kLow, kHigh);
  }
  const Words2 codes = encode<Format>(y);
  // A scale of 0 or NaN: the code of 0.
  constexpr uint32_t kZeros = kNibble ? 0x08080808u : 0u;
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
  // FP16 bits. Adding 0 turns -0 into +0: the minimum of both zeros may be either one, and the
  // bytes must not depend on it.
  KVQUANT_DEVICE uint16_t zero_point() const {
    return to_half_bits(clamp(empty() ? 0.0f : add_rn(low, 0.0f), -kFp16Max, kFp16Max));
  }
  KVQUANT_DEVICE uint16_t scale(float zero) const {
    constexpr float kToScale = float(1.0 / double(kSymmetric ? Format::kReach : Format::kLevels));
    const float range = kSymmetric ? high : sub_rn(empty() ? 0.0f : add_rn(high, 0.0f), zero);
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
  KVQUANT_DEVICE bool empty() const { return !is_finite(low); }
};

}  // namespace kvquant
