// exp for instruction sets without an instruction that helps.
#pragma once

#include "kvquant/constants.h"
#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// exp(x) = 2^n e^r for x < 88 with a relative error of 2e-7; 0 for x < -87; NaN stays NaN. The
// polynomial has the least largest relative error, 9e-8 for |r| < log(2) / 2, of those of degree 5
// that are 1 at 0.
template <class Vec>
inline Vec exp_of(Vec x) {
  const Vec a = Vec::max(Vec(-87.0f), x), n = Vec::round(a * Vec(kLog2e));
  Vec r = Vec::fma(n, Vec(-0.693359375f), a);
  r = Vec::fma(n, Vec(2.12194440e-4f), r);
  Vec y = Vec(8.2902721e-3f);
  y = Vec::fma(y, r, Vec(4.1898160e-2f));
  y = Vec::fma(y, r, Vec(1.6667638e-1f));
  y = Vec::fma(y, r, Vec(4.9999148e-1f));
  y = Vec::fma(y, r, Vec(9.9999971e-1f));
  y = Vec::fma(y, r, Vec(1.0f));
  return Vec::zero_where_less(x, Vec(-87.0f), Vec::scale(y, n));
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
