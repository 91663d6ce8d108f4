// exp for instruction sets without an instruction that helps.
#pragma once

#include "kvquant/constants.h"
#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// exp(x) = 2^n e^r for x < 88 with a relative error of 1e-7, by the polynomial of Cephes' expf; 0
// for x < -87; NaN stays NaN.
template <class Vec>
inline Vec exp_of(Vec x) {
  const Vec a = Vec::max(Vec(-87.0f), x), n = Vec::round(a * Vec(kLog2e));
  Vec r = Vec::fma(n, Vec(-0.693359375f), a);
  r = Vec::fma(n, Vec(2.12194440e-4f), r);
  Vec y = Vec(1.9875691500e-4f);
  y = Vec::fma(y, r, Vec(1.3981999507e-3f));
  y = Vec::fma(y, r, Vec(8.3334519073e-3f));
  y = Vec::fma(y, r, Vec(4.1665795894e-2f));
  y = Vec::fma(y, r, Vec(1.6666665459e-1f));
  y = Vec::fma(y, r, Vec(5.0000001201e-1f));
  y = Vec::fma(y, r * r, r) + Vec(1.0f);
  return Vec::zero_where_less(x, Vec(-87.0f), Vec::scale(y, n));
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
