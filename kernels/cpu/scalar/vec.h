// `Vec` without vector instructions: eight floats in plain loops, which a compiler may vectorise.
//
// Every instruction set has a `Vec` with the same members, so that kernels are written once:
//   load, store                float, Half or BFloat16 in memory; arithmetic is always float
//   decode(Format, row, c, d)  kWidth codes, from channel c on in a row of head_dim d, as floats
//                              before scaling
//   store_codes(Format, p)     the inverse, for floats that are already rounded (E4M3: it rounds)
//   where(bits, a, b)          a in the lanes whose bit is set, b in the others
//   butterfly(x, stride)       one step of a Hadamard transform within the vector
//   sum_each(x)                lane i is the sum of all lanes of x[i], i < kWidth
#pragma once

#include <cmath>
#include <cstring>

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  float lane[kWidth];

  Vec() = default;
  explicit Vec(float x) {
    for (float& l : lane) l = x;
  }
  template <class F>
  static Vec of(F f) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.lane[i] = f(i);
    return r;
  }
  template <class T>
  static Vec load(const T* p) {
    return of([&](int i) { return to_float(p[i]); });
  }
  void store(float* p) const { std::memcpy(p, lane, sizeof(lane)); }
  void store(Half* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = to_half(lane[i]);
  }
  void store(BFloat16* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = to_bfloat16(lane[i]);
  }

  static Vec decode(Signed8, const uint8_t* row, int c, int) {
    return of([&](int i) { return float(int8_t(row[c + i])); });
  }
  static Vec decode(Unsigned8, const uint8_t* row, int c, int) {
    return of([&](int i) { return float(row[c + i]); });
  }
  static Vec decode(E4M3, const uint8_t* row, int c, int) {
    return of([&](int i) { return e4m3_to_float(row[c + i]); });
  }
  static Vec decode(Nibble, const uint8_t* row, int c, int head_dim) {
    NibblePlace place = nibble_place(c, head_dim);
    return of([&](int i) { return float(row[place.byte + i] >> place.shift & 15); });
  }
  void store_codes(Signed8, uint8_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = uint8_t(int32_t(lane[i]));
  }
  void store_codes(E4M3, uint8_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_e4m3(lane[i]);
  }

  friend Vec operator+(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  // a * b + c. The other instruction sets round once, so only attention may use it: stored bytes
  // are defined with two roundings.
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // If either is NaN, the result is b.
  static Vec max(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec min(Vec a, Vec b) {
    return of([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec abs(Vec a) {
    return of([&](int i) { return std::fabs(a.lane[i]); });
  }
  static Vec round(Vec a) {
    return of([&](int i) { return std::nearbyint(a.lane[i]); });
  }
  // 2^a, or next to nothing for a < -100.
  static Vec exp2(Vec a) {
    return of([&](int i) { return std::exp2(a.lane[i]); });
  }
  // The same as precisely as 16-bit outputs need it.
  static Vec exp2_of_16_bits(Vec a) { return exp2(a); }
  static Vec where(uint32_t bits, Vec a, Vec b) {
    return of([&](int i) { return bits >> i & 1 ? a.lane[i] : b.lane[i]; });
  }
  static uint32_t less(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= uint32_t(a.lane[i] < b.lane[i]) << i;
    return bits;
  }
  static uint32_t finite(Vec a) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i)
      bits |= uint32_t((bits_of(a.lane[i]) & 0x7fffffffu) < 0x7f800000u) << i;
    return bits;
  }
  static uint32_t not_nan(Vec a) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= uint32_t(a.lane[i] == a.lane[i]) << i;
    return bits;
  }
  static Vec butterfly(Vec x, int stride) {
    return of([&](int i) {
      float other = x.lane[i ^ stride];
      return i & stride ? other - x.lane[i] : x.lane[i] + other;
    });
  }
  static float sum(Vec a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) +
           ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  static float largest(Vec a) {
    float m = a.lane[0];
    for (int i = 1; i < kWidth; ++i) m = a.lane[i] > m ? a.lane[i] : m;
    return m;
  }
  static Vec sum_each(const Vec* x) {
    return of([&](int i) { return sum(x[i]); });
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
