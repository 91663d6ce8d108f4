// The normalised Hadamard transform along head_dim, which is its own inverse: block-diagonal, with
// blocks of the largest power of two that divides head_dim. Stored bytes depend on its rounding, so
// the order is fixed: butterflies of stride 1, 2, 4, .., then one product.
#pragma once

#include <cmath>

#include "vec.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

inline void rotate(float* x, int head_dim) {
  const int block = head_dim & -head_dim, W = Vec::kWidth;
  for (int c = 0; c < head_dim; c += W) {
    Vec v = Vec::load(x + c);
    for (int stride = 1; stride < W; stride *= 2) v = Vec::butterfly(v, stride);
    v.store(x + c);
  }
  for (int stride = W; stride < block; stride *= 2) {
    for (int pair = 0; pair < head_dim; pair += 2 * stride) {
      for (int c = pair; c < pair + stride; c += W) {
        Vec a = Vec::load(x + c), b = Vec::load(x + c + stride);
        (a + b).store(x + c);
        (a - b).store(x + c + stride);
      }
    }
  }
  const Vec norm(float(1.0 / std::sqrt(double(block))));
  for (int c = 0; c < head_dim; c += W) (Vec::load(x + c) * norm).store(x + c);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
