// What blocks leave for merging, per (batch row, head, query, slice), in this order of sizes:
//
//   float sums[rows][slices][v_head_dim]   weighted values, relative to exp(max); of stored values
//                                         that are rotated, still rotated
//   float states[rows][slices][2]          largest score (natural logarithm), sum of exponentials
//
// slices = the kinds of columns that have copies, in the order below, then the splits of the length
// that the host knows. Slices beyond the length on the device are neither written nor read.
#pragma once

#include "cuda/columns.h"

namespace kvquant {

enum Kind { kCopiedBoth = 0, kCopiedKeys = 1, kCopiedValues = 2, kStoredBoth = 3 };

// Columns that are read from a copy of their values only: blocks of the channel grid cannot be read
// column by column, and their copies reach further back than those of the values.
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
