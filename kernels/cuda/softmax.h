// The softmax of the two query rows that a lane takes part in (layout.h), while tiles arrive.
//
// It is the state of kvquant/softmax_state.h, in units of log2. A row's maximum is raised only when
// a score exceeds it by more than kHeadroom, so most tiles need neither an exchange between lanes
// nor rescaling. Weights are therefore at most 2^8, and finite in FP16 when multiplied by
// kWeightUnit. In float32 there is no headroom, so that the smallest weights are exact, too: two
// FP16 terms leave 2^-25.
#pragma once

#include "cuda/layout.h"
#include "cuda/warp_row.h"
#include "kvquant/constants.h"
#include "kvquant/softmax_state.h"

namespace kvquant {

constexpr float kHeadroom = kIsFloat32 ? 0.0f : 8.0f;
constexpr int kLogWeightUnit = kIsFloat32 ? 15 : 7;
constexpr float kWeightUnit = float(1 << kLogWeightUnit);

struct RowsSoftmax {
  using Lanes = Layout<kRows>;
  float max[2] = {-infinity(), -infinity()};
  float sum[2] = {0.0f, 0.0f};  // over this lane's columns

  // Raises the maxima if this lane's largest scores require it; returns whether sums have to be
  // multiplied by `factor`.
  KVQUANT_DEVICE bool update(const float (&largest)[2], float (&factor)[2]) {
    if (!warp_any(largest[0] > max[0] + kHeadroom || largest[1] > max[1] + kHeadroom)) {
      return false;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = largest[r];
#pragma unroll
      for (int lanes = Lanes::kFirstLane; lanes < Lanes::kEndLane; lanes *= 2) {
        top = fmaxf(top, shuffle_xor(top, lanes));
      }
      factor[r] = 1.0f;
      if (top > max[r] + kHeadroom) {
        factor[r] = exp2_approx(max[r] - top);
        max[r] = top;
        sum[r] *= factor[r];
      }
    }
    return true;
  }
  KVQUANT_DEVICE float base(int r) const { return max[r] == -infinity() ? 0.0f : max[r]; }

  // Adds up the sums of a row's lanes.
  KVQUANT_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = Lanes::kFirstLane; lanes < Lanes::kEndLane; lanes *= 2) {
        sum[r] += shuffle_xor(sum[r], lanes);
      }
    }
  }
};

// Softcapping of scores, for calls that have it (Pass::attend asks once per tile); everything is in
// units of log2.
struct ScoreRule {
  float softcap, rate;

  KVQUANT_DEVICE explicit ScoreRule(const KvquantAttention& a)
      : softcap(float(a.softcap) * kLog2e), rate(float(2.0 / a.softcap)) {}
  // softcap * tanh(x / softcap)
  KVQUANT_DEVICE float operator()(float x) const {
    return softcap * (1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(x * rate)));
  }
};

}  // namespace kvquant
