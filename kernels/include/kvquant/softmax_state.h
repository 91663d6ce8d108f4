// The softmax state of one query row: the largest score so far, and the sum of exponentials
// relative to it. The caller keeps the accumulated values, relative to the same score. Scores
// arrive in tiles; states of different tiles are merged.
//
// Sources: online softmax, https://arxiv.org/abs/1805.02867; split and merge,
// https://arxiv.org/abs/2311.01282.
#pragma once

#ifndef __CUDACC_RTC__
#include <math.h>
#endif

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct SoftmaxState {
  float max = -infinity();
  float sum = 0.0f;

  // Scores are taken relative to it: the largest score, or 0 while every column is hidden.
  KVQUANT_FN float base() const { return max == -infinity() ? 0.0f : max; }

  // Raises the maximum to `largest`; returns the factor for everything accumulated so far.
  KVQUANT_FN float update(float largest) {
    if (!(largest > max)) return 1.0f;
    float factor = expf(max - largest);
    max = largest;
    sum *= factor;
    return factor;
  }

  // Takes in another state. The caller multiplies its own accumulated values by `ours`, the other's
  // by `theirs`, and adds.
  struct Factors {
    float ours, theirs;
  };
  KVQUANT_FN Factors merge(const SoftmaxState& other) {
    float ours = update(other.max), theirs = other.max == max ? 1.0f : expf(other.max - base());
    sum += theirs * other.sum;
    return {ours, theirs};
  }

  // The factor that turns accumulated values into the output; 0 if every column was hidden.
  KVQUANT_FN float finish() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  KVQUANT_FN float logsumexp() const { return sum == 0.0f ? -infinity() : max + logf(sum); }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
