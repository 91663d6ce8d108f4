// The partial results that blocks leave for merging. A slice is the contribution of one block to
// one query row; rows are `[batch, num_heads, q_len]`:
//
//   float sums[rows][slices][v_head_dim]   weighted values relative to exp(max); still rotated if
//                                          the stored values are
//   float states[rows][slices][2]          largest score (natural logarithm), sum of exponentials
//
// The first slices are those of the three kinds with copies, in the order below, if there are
// copies. Then come the splits of the length that the host knows; beyond the length on the device
// they are neither written nor read.
#pragma once

#include "cuda/columns.h"

namespace kvquant {

enum Kind { kCopiedBoth = 0, kCopiedKeys = 1, kCopiedValues = 2, kStoredBoth = 3 };

// Whether there are columns of which only the values are read from copies. There are none with keys
// on the channel grid: blocks are read whole, so the copies of keys reach at least as far back as
// those of the values.
constexpr bool kHasCopiedValues = StoredValues::kScaled && !StoredKeys::kChannelGrid;

struct Partials {
  float *sums, *states;
  int extra, slices;

  KVQUANT_DEVICE Partials(const KvquantAttention& a, float* memory) {
    const bool copies = a.keys.recent || a.keys.sink || a.values.recent || a.values.sink;
    extra = copies ? 3 : 0;
    slices = extra + int((a.kv_len + kSplit - 1) / kSplit);
    sums = memory;
    states = memory + a.batch * a.num_heads * a.q_len * slices * kValueDim;
  }
  KVQUANT_DEVICE int64_t at(int64_t row, int slice) const { return row * slices + slice; }
};

}  // namespace kvquant
