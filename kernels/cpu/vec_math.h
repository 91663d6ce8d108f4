// Elementary functions from a vector's own arithmetic.
#pragma once

namespace kvquant {
inline namespace KVQUANT_ISA {

// exp(x) = 2^n e^r for x < 88, to 1e-7 by the polynomial of Cephes' expf; 0 below exp(-87); NaN
// stays NaN. `V::scale(y, n)` multiplies by 2^n for integral n >= -126.
template <class V>
V exp_of(V x) {
  const V a = V::max(V(-87.0f), x), n = V::round(a * V(1.44269504088896341f));
  V r = V::fma(n, V(-0.693359375f), a);
  r = V::fma(n, V(2.12194440e-4f), r);
  V y = V(1.9875691500e-4f);
  y = V::fma(y, r, V(1.3981999507e-3f));
  y = V::fma(y, r, V(8.3334519073e-3f));
  y = V::fma(y, r, V(4.1665795894e-2f));
  y = V::fma(y, r, V(1.6666665459e-1f));
  y = V::fma(y, r, V(5.0000001201e-1f));
  y = V::fma(y, r * r, r) + V(1.0f);
  return V::where(V::less(x, V(-87.0f)), V(0.0f), V::scale(y, n));
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
