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

// Whether copies of A reach farther back than those of B: B has none, or A has longer blocks on the
// channel grid, the newest of which is read from copies as a whole.
template <class A, class B>
constexpr bool kReachesFarther =
    A::kScaled && (!B::kScaled || (A::kChannelGrid && (!B::kChannelGrid || A::kGroup > B::kGroup)));
// Whether there are columns of which only the keys, or only the values, are read from copies.
constexpr bool kHasCopiedKeys = kReachesFarther<StoredKeys, StoredValues>;
constexpr bool kHasCopiedValues = kReachesFarther<StoredValues, StoredKeys>;

// The stored columns of a sequence are split among blocks: all blocks but the last have as many
// columns, a multiple of kUnit, and as few as give all heads of the sequence kEnoughBlocks blocks or
// half of them; kMostColumns at most. Neither the GPU nor the batch matters, so results do not
// depend on them. All but the number of columns are powers of two, which saves divisions.
struct Splits {
  static KVQUANT_FN constexpr int log2(int x) { return x > 1 ? 1 + log2(x / 2) : 0; }
  static_assert((kUnit & (kUnit - 1)) == 0 && (kEnoughBlocks & (kEnoughBlocks - 1)) == 0,
                "KVQUANT_UNIT, KVQUANT_BLOCKS: powers of two");

  // The logarithm of the number of splits of each head that are enough.
  static KVQUANT_DEVICE int log_enough(const KvquantAttention& a) {
    int below = int(a.num_kv_heads) - 1;  // has as many bits as the logarithm, rounded up
#pragma unroll
    for (int bits = 1; bits < 32; bits *= 2) below |= below >> bits;
    const int left = log2(kEnoughBlocks) - count_bits(below);
    return left > 0 ? left : 0;
  }
  // The columns of a block, for a sequence of `kv_len` columns.
  static KVQUANT_DEVICE int columns(const KvquantAttention& a, int kv_len) {
    const int shift = log2(kUnit) + log_enough(a);
    const int columns = ((kv_len + (1 << shift) - 1) >> shift) * kUnit;
    return columns < kUnit ? kUnit : columns < kMostColumns ? columns : kMostColumns;
  }
  // The largest number of splits of any sequence of at most `kv_len` columns.
  static KVQUANT_DEVICE int most(const KvquantAttention& a, int kv_len) {
    const int by_unit = (kv_len + kUnit - 1) / kUnit, limit = 1 << log_enough(a),
              by_most = (kv_len + kMostColumns - 1) / kMostColumns,
              few = by_unit < limit ? by_unit : limit;
    return few > by_most ? few : by_most;
  }
};

struct Partials {
  float *sums, *states;
  int extra, slices;

  KVQUANT_DEVICE Partials(const KvquantAttention& a, float* memory) {
    const bool copies = a.keys.recent || a.keys.sink || a.values.recent || a.values.sink;
    extra = copies ? 3 : 0;
    slices = extra + Splits::most(a, int(a.kv_len));
    sums = memory;
    states = memory + a.batch * a.num_heads * a.q_len * slices * kValueDim;
  }
  KVQUANT_DEVICE int64_t at(int64_t row, int slice) const { return row * slices + slice; }
};

}  // namespace kvquant
