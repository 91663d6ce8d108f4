// Dot products for NEON: of bytes with the instruction `sdot`, which adds four products of signed
// bytes to each of four sums, and of floats for fp8.
//
// Codes are signed bytes; codes up to 255 are made so by subtracting kBias. Weights, which stand for
// queries or probabilities, are integers of 16 bits with a common float factor, split into two
// signed bytes, low + 256 high: they are as exact as BF16 and FP16 queries, but not as float ones.
//
// No sum overflows: 512 codes of -128 .. 127 times kLargest are less than 2^31.
#pragma once

#include "cpu/whole_tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// The sums of the products with both bytes of weights.
struct ByteSums {
  int32x4_t low, high;

  void clear() { low = high = vdupq_n_s32(0); }
  int32x4_t whole() const { return vaddq_s32(low, vshlq_n_s32(high, 8)); }
};

inline Vec floats_of(int32x4_t a, int32x4_t b) { return {vcvtq_f32_s32(a), vcvtq_f32_s32(b)}; }

// Rounds floats to weights, and adds the weights up. Sixteen weights are stored as their low bytes,
// then their high bytes.
struct WeightMaker {
  static constexpr float kLargest = 127 * 256 + 127;
  int32x4_t sums = vdupq_n_s32(0);

  // What floats are multiplied by before they are rounded to weights.
  static float inverse(float factor) { return factor == 0.0f ? 0.0f : 1.0f / factor; }
  void make(Vec a, Vec b, int16_t* weights) {
    const Bytes x = bytes_of(a, b);
    vst1q_s8(reinterpret_cast<int8_t*>(weights), x.low);
    vst1q_s8(reinterpret_cast<int8_t*>(weights) + 16, x.high);
  }
  float sum() const { return float(vaddvq_s32(sums)); }

 protected:
  struct Bytes {
    int8x16_t low, high;
  };
  Bytes bytes_of(Vec a, Vec b) {
    const int16x8_t x = rounded(a), y = rounded(b);
    sums = vpadalq_s16(vpadalq_s16(sums, x), y);
    // The low byte is signed, so the high one is rounded, not truncated. No sum is above 32767.
    const int16x8_t half = vdupq_n_s16(128);
    return {vcombine_s8(vmovn_s16(x), vmovn_s16(y)),
            vcombine_s8(vshrn_n_s16(vaddq_s16(x, half), 8), vshrn_n_s16(vaddq_s16(y, half), 8))};
  }

 private:
  static int16x8_t rounded(Vec x) {
    return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.low)), vmovn_s32(vcvtnq_s32_f32(x.high)));
  }
};

template <class F>
struct DotOperand {
  using Format = F;
  using Weight = int16_t;
  using Maker = WeightMaker;
  using KeyMaker = InOrder<WeightMaker>;
  static constexpr int kBytes = kBytesOf16<F>, kKeyRows = 2;
  static constexpr float kBias = std::is_same<F, Unsigned8>::value ? 128.0f : 0.0f;
  static constexpr bool kRounds = true;  // the weights are integers

  static float factor(const Largest& x, int) { return x.factor(WeightMaker::kLargest); }
  // Turns stored bytes into codes; of a byte of two nibbles, the low or the high one.
  static int8x16_t codes(uint8x16_t bytes, bool high = false) {
    if (std::is_same<F, Unsigned8>::value) bytes = veorq_u8(bytes, vdupq_n_u8(128));
    if (std::is_same<F, Nibble>::value)
      bytes = high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
    return vreinterpretq_s8_u8(bytes);
  }
};

struct E4M3Operand {
  using Format = E4M3;
  using Weight = float;
  using Maker = FloatMaker;
  using KeyMaker = InOrder<FloatMaker>;
  static constexpr int kBytes = 16, kKeyRows = 4;
  static constexpr float kBias = 0.0f;
  static constexpr bool kRounds = false;

  static float factor(const Largest&, int) { return 256.0f; }
  static Vec load(const uint8_t* p) { return Vec::small_e4m3(p); }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
