// 2^x for instruction sets without an instruction that helps.
#pragma once

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// 2^x = 2^n 2^r for x < 127.5 with a relative error of 2e-7; NaN stays NaN. An x below -100 counts as
// -100: the result adds nothing to a sum, and times a scale it is no subnormal number, which is slow.
// The polynomial has the least largest relative error, 9e-8 for |r| < 1 / 2, of those of degree 5
// that are 1 at 0.
template <class Vec>
inline Vec exp2_of(Vec x) {
  const Vec a = Vec::max(Vec(-100.0f), x), n = Vec::round(a), r = a - n;
  Vec y = Vec(1.3264659e-3f);
  y = Vec::fma(y, r, Vec(9.6715659e-3f));
  y = Vec::fma(y, r, Vec(5.5507343e-2f));
  y = Vec::fma(y, r, Vec(2.4022241e-1f));
  y = Vec::fma(y, r, Vec(6.9314698e-1f));
  y = Vec::fma(y, r, Vec(1.0f));
  return Vec::scale(y, n);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
