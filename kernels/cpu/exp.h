// 2^x.
#pragma once

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// The polynomial with these coefficients, the constant one first.
template <class Vec>
inline Vec polynomial(Vec, float constant) {
  return Vec(constant);
}
template <class Vec, class... Floats>
inline Vec polynomial(Vec x, float constant, Floats... others) {
  return Vec::fma(polynomial(x, others...), x, Vec(constant));
}

// The rest is for instruction sets without an instruction that helps.

// x = whole + rest, with |rest| <= 1 / 2. An x below -100 counts as -100: 2^x then adds nothing to a
// sum, and times a scale it is no subnormal number, which is slow.
template <class Vec>
struct Exponent {
  Vec whole, rest;
  explicit Exponent(Vec x) {
    const Vec a = Vec::max(Vec(-100.0f), x);
    whole = Vec::round(a);
    rest = a - whole;
  }
};

// 2^x for x < 127.5 with a relative error of 2e-7; NaN stays NaN. The polynomial has the least largest
// relative error, 9e-8, of those of degree 5 that are 1 at 0.
template <class Vec>
inline Vec exp2_of(Vec x) {
  const Exponent<Vec> e(x);
  const Vec y = polynomial(e.rest, 1.0f, 6.9314698e-1f, 2.4022241e-1f, 5.5507343e-2f, 9.6715659e-3f,
                           1.3264659e-3f);
  return Vec::scale(y, e.whole);
}

// The same with a relative error of 7.5e-5, a twentieth of BF16's and a third of FP16's rounding: the
// least of polynomials of degree 3.
template <class Vec>
inline Vec rough_exp2_of(Vec x) {
  const Exponent<Vec> e(x);
  const Vec y = polynomial(e.rest, 9.9992808e-1f, 6.9326100e-1f, 2.4261106e-1f, 5.5171557e-2f);
  return Vec::scale(y, e.whole);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
