// 16-bit and e4m3 arithmetic as on the GPU, with the host's own types: formats.h is among the files
// that the emulator checks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace kvquant::emulator {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t bits) { return float(bit_cast<_Float16>(bits)); }
inline float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// Odd rounding of a sum of two doubles: a last bit of 1 says "not exact", so that rounding again,
// to fewer bits, gives what one rounding of the exact sum would.
inline double sum_to_odd(double a, double b) {
  const double sum = a + b;
  if (!isfinite(sum)) return sum;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);
  uint64_t bits = bit_cast<uint64_t>(sum);
  if (error == 0.0 || bits & 1) return sum;
  return bit_cast<double>((error > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1);
}

inline uint16_t to_half(double x) { return isnan(x) ? 0x7fff : bit_cast<uint16_t>(_Float16(x)); }
// Rounds half to even to 8 bits of mantissa.
inline uint16_t to_bfloat16(double x) {
  if (isnan(x)) return 0x7fff;
  if (x == 0.0 || isinf(x)) return uint16_t(bit_cast<uint32_t>(float(x)) >> 16);
  int exponent;
  frexp(x, &exponent);
  const double step = ldexp(1.0, (exponent < -125 ? -125 : exponent) - 8);
  return uint16_t(bit_cast<uint32_t>(float(nearbyint(x / step) * step)) >> 16);
}

inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  return to_half(sum_to_odd(double(half_to_float(a)) * half_to_float(b), half_to_float(c)));
}

// Saturating, half to even.
inline uint8_t to_e4m3(double x) {
  if (isnan(x)) return 0x7f;
  const uint8_t sign = signbit(x) ? 0x80 : 0;
  const double size = fabs(x) < 448.0 ? fabs(x) : 448.0;
  int exponent;
  frexp(size, &exponent);
  if (size < 0x1p-6) exponent = -5;
  const int mantissa = int(nearbyint(ldexp(size, 4 - exponent)));  // 8 .. 16; less if subnormal
  return uint8_t(sign | (8 * (exponent + 5) + mantissa));
}

// `f` on both halves of the words.
template <class F, class... Word>
uint32_t on_pairs(F f, Word... words) {
  return uint32_t(f(uint16_t(words)...)) | uint32_t(f(uint16_t(words >> 16)...)) << 16;
}

}  // namespace kvquant::emulator
