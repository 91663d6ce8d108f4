// `Vec` for NEON, which every 64-bit ARM processor has: eight floats in two registers. The members
// are described in scalar/vec.h.
#pragma once

#include <arm_neon.h>

#include "cpu/exp.h"
#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  float32x4_t low, high;

  Vec() = default;
  Vec(float32x4_t a, float32x4_t b) : low(a), high(b) {}
  explicit Vec(float x) : low(vdupq_n_f32(x)), high(low) {}

  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Vec load(const Half* p) { return of_halves(vld1q_u16(&p->bits)); }
  static Vec load(const BFloat16* p) {
    const uint16x8_t x = vld1q_u16(&p->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(x), 16))};
  }
  void store(float* p) const {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
  void store(Half* p) const {
    vst1q_u16(&p->bits, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(low), vcvt_f16_f32(high))));
  }
  void store(BFloat16* p) const {
    vst1q_u16(&p->bits, vcombine_u16(to_bfloat16s(low), to_bfloat16s(high)));
  }

  static Vec decode(Signed8, const uint8_t* row, int c, int) {
    const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(row + c)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)))};
  }
  static Vec decode(Unsigned8, const uint8_t* row, int c, int) {
    return of_bytes(vld1_u8(row + c));
  }
  static Vec decode(E4M3, const uint8_t* row, int c, int) {
    return small_e4m3(row + c) * Vec(256.0f);
  }
  // 2^-8 times eight elements: with exponent and mantissa shifted to where FP16 has them, the bits
  // are the FP16 encoding of that. Bit 14, which gets a copy of the sign, is cleared.
  static Vec small_e4m3(const uint8_t* p) {
    const int16x8_t wide = vshll_n_s8(vreinterpret_s8_u8(vld1_u8(p)), 7);
    return of_halves(vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xbfff)));
  }
  static Vec decode(Nibble, const uint8_t* row, int c, int head_dim) {
    const NibblePlace place = nibble_place(c, head_dim);
    const uint8x8_t x = vshl_u8(vld1_u8(row + place.byte), vdup_n_s8(int8_t(-place.shift)));
    return of_bytes(vand_u8(x, vdup_n_u8(15)));
  }
  void store_codes(Signed8, uint8_t* p) const {
    store_low_bytes(vreinterpretq_u32_s32(vcvtq_s32_f32(low)),
                    vreinterpretq_u32_s32(vcvtq_s32_f32(high)), p);
  }
  void store_codes(E4M3, uint8_t* p) const { store_low_bytes(to_e4m3s(low), to_e4m3s(high), p); }

  friend Vec operator+(Vec a, Vec b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  friend Vec operator-(Vec a, Vec b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  friend Vec operator*(Vec a, Vec b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
  }
  friend Vec operator/(Vec a, Vec b) {
    return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  // The instructions for maxima return NaN if either operand is NaN.
  static Vec max(Vec a, Vec b) {
    return select(vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high), a, b);
  }
  static Vec min(Vec a, Vec b) {
    return select(vcltq_f32(a.low, b.low), vcltq_f32(a.high, b.high), a, b);
  }
  // Compares the bits as unsigned integers. Among magnitudes the larger integer is the larger
  // float; infinity is above every finite float, and NaN above infinity.
  static Vec max_bits(Vec a, Vec b) {
    return {vreinterpretq_f32_u32(vmaxq_u32(bits_of(a.low), bits_of(b.low))),
            vreinterpretq_f32_u32(vmaxq_u32(bits_of(a.high), bits_of(b.high)))};
  }
  static Vec abs(Vec a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
  static Vec round(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
  static Vec exp2(Vec x) { return exp2_of(x); }
  static Vec exp2_of_16_bits(Vec x) { return rough_exp2_of(x); }
  // a * 2^n for integral n >= -126.
  static Vec scale(Vec a, Vec n) { return a * Vec(power_of_two(n.low), power_of_two(n.high)); }
  static uint32_t less(Vec a, Vec b) {
    return bits_where(vcltq_f32(a.low, b.low), vcltq_f32(a.high, b.high));
  }
  static uint32_t finite(Vec a) { return less(abs(a), Vec(__builtin_inff())); }
  static uint32_t not_nan(Vec a) {
    return bits_where(vceqq_f32(a.low, a.low), vceqq_f32(a.high, a.high));
  }
  static Vec where(uint32_t bits, Vec a, Vec b) {
    const uint32x4_t all = vdupq_n_u32(bits);
    return select(vtstq_u32(all, bit_of_lane(0)), vtstq_u32(all, bit_of_lane(4)), a, b);
  }
  static Vec butterfly(Vec x, int stride) {
    if (stride == 4) return {vaddq_f32(x.low, x.high), vsubq_f32(x.low, x.high)};
    // Lanes with the bit of the stride set are subtracted: their sign is changed, then all are added.
    const uint32x4_t lane = bit_of_lane(0);
    const uint32x4_t sign = vandq_u32(vtstq_u32(lane, vdupq_n_u32(stride == 1 ? 0b1010 : 0b1100)),
                                      vdupq_n_u32(0x80000000u));
    const auto step = [&](float32x4_t a) {
      const float32x4_t other = stride == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
      return vaddq_f32(other, vreinterpretq_f32_u32(veorq_u32(bits_of(a), sign)));
    };
    return {step(x.low), step(x.high)};
  }
  static float sum(Vec a) {
    const float32x4_t x = vaddq_f32(a.low, a.high);
    return vaddv_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)));
  }
  static float largest(Vec a) { return vmaxnmvq_f32(vmaxnmq_f32(a.low, a.high)); }
  static uint32_t largest_bits(Vec a) {
    return vmaxvq_u32(vmaxq_u32(bits_of(a.low), bits_of(a.high)));
  }
  static Vec sum_each(const Vec* x) {
    const auto four = [](const Vec* y) {
      return vpaddq_f32(vpaddq_f32(vaddq_f32(y[0].low, y[0].high), vaddq_f32(y[1].low, y[1].high)),
                        vpaddq_f32(vaddq_f32(y[2].low, y[2].high), vaddq_f32(y[3].low, y[3].high)));
    };
    return {four(x), four(x + 4)};
  }

 private:
  static uint32x4_t bits_of(float32x4_t x) { return vreinterpretq_u32_f32(x); }
  static uint32x4_t bit_of_lane(int first) {
    static const uint32_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    return vld1q_u32(bits + first);
  }
  static uint32_t bits_where(uint32x4_t a, uint32x4_t b) {
    return vaddvq_u32(vorrq_u32(vandq_u32(a, bit_of_lane(0)), vandq_u32(b, bit_of_lane(4))));
  }
  static Vec select(uint32x4_t low, uint32x4_t high, Vec a, Vec b) {
    return {vbslq_f32(low, a.low, b.low), vbslq_f32(high, a.high, b.high)};
  }
  static Vec of_halves(uint16x8_t x) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x))),
            vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(x)))};
  }
  static Vec of_bytes(uint8x8_t bytes) {
    const uint16x8_t x = vmovl_u8(bytes);
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(x)))};
  }
  static float32x4_t power_of_two(float32x4_t n) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
  }
  static uint16x4_t to_bfloat16s(float32x4_t x) {
    const uint32x4_t bits = bits_of(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
  }
  // The steps of float_to_e4m3.
  static uint32x4_t to_e4m3s(float32x4_t x) {
    const uint32x4_t bits = bits_of(x), magnitude = vandq_u32(bits, vdupq_n_u32(0x7fffffff));
    const uint32x4_t sign = vandq_u32(vshrq_n_u32(bits, 24), vdupq_n_u32(0x80));
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(magnitude, 20), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(magnitude, vaddq_u32(odd, vdupq_n_u32(0x7ffff)));
    const uint32x4_t normal = vsubq_u32(vshrq_n_u32(rounded, 20), vdupq_n_u32(120 << 3));
    const float32x4_t shifted = vaddq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(16384.0f));
    const uint32x4_t small = vsubq_u32(bits_of(shifted), vdupq_n_u32(0x46800000));
    return vorrq_u32(sign, vbslq_u32(vcltq_u32(magnitude, vdupq_n_u32(0x3c800000)), small, normal));
  }
  static void store_low_bytes(uint32x4_t a, uint32x4_t b, uint8_t* p) {
    vst1_u8(p, vmovn_u16(vcombine_u16(vmovn_u32(a), vmovn_u32(b))));
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
