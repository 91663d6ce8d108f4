// 2^x for instruction sets without an instruction that helps.
#pragma once

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

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
  Vec y = Vec(1.3264659e-3f);
  y = Vec::fma(y, e.rest, Vec(9.6715659e-3f));
  y = Vec::fma(y, e.rest, Vec(5.5507343e-2f));
  y = Vec::fma(y, e.rest, Vec(2.4022241e-1f));
  y = Vec::fma(y, e.rest, Vec(6.9314698e-1f));
  y = Vec::fma(y, e.rest, Vec(1.0f));
  return Vec::scale(y, e.whole);
}

// The same with a relative error of 7.5e-5, a twentieth of BF16's and a third of FP16's rounding: the
// least of polynomials of degree 3.
template <class Vec>
inline Vec rough_exp2_of(Vec x) {
  const Exponent<Vec> e(x);
  Vec y = Vec(5.5171557e-2f);
  y = Vec::fma(y, e.rest, Vec(2.4261106e-1f));
  y = Vec::fma(y, e.rest, Vec(6.9326100e-1f));
  y = Vec::fma(y, e.rest, Vec(9.9992808e-1f));
  return Vec::scale(y, e.whole);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
