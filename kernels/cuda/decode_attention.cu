// Attention of up to 32 new queries over one quantized cache: `reference.decode_attention`.
//
//   decode_attention_kernel(a, partial)
//     grid      (3 if a has exact copies, + Splits::most(a),
//                num_kv_heads * row tiles,
//                batch * kShares of the values' channels (specialisation.h))
//     block     KVQUANT_THREADS, or fewer where shared memory does not suffice
//     row tile  kRows, 8 or 16, of the q_per_kv * q_len query rows of a kv head (layout.h)
//   merge_splits_kernel(a, partial)
//     grid      (q_len, num_heads, batch)
//     block     32 * kMergeWarps threads
//
//     x = 0 .. 2     the kinds of columns with copies (columns.h)      |
//     x = 3          stored columns    0 .. split                      |  partials.h -> merge.h
//     x = 4          stored columns    split .. 2 split                |
//     ..             (beyond the length: returns at once)              |
//
// The merge starts while attention runs, and attention while an append does (primitives.h).
//
// Blocks do not communicate, and slices are merged in a fixed order, so the result of a query row
// does not depend on the other rows of a batch.
//
// eval/cuda_model.py counts the instructions of the loop and predicts its speed; none of it is
// measured. Three blocks of 128 threads on a multiprocessor, each one stage of 18 to 20 KB ahead,
// have 55 KB in flight; 4.8 TB/s times 0.8 us, an H200's, is 29 KB for each.
#include "cuda/merge.h"

namespace kvquant {

// Shared memory of two stages of wide tiles, so that three blocks of the usual formats fit an SM with
// 164 KB.
constexpr int kTilesLimit = 46 * 1024;
// Shared memory of a block with more stages than two, so that two blocks fit an SM with 100 KB (sm_86,
// sm_89, sm_120), which takes 1 KB for each.
constexpr int kStagesLimit = 49 * 1024;
// Shared memory of a block, on the GPUs that have least (sm_86, sm_89, sm_120). One limit for all:
// results are then the same on each.
constexpr int kSharedLimit = 99 * 1024;

template <class Keys, class Values, bool kCopiedKeysHere, bool kCopiedValuesHere, int kWarps>
struct Plan {
  template <int kTile, int kStages>
  using Of = Pass<Keys, Values, kCopiedKeysHere, kCopiedValuesHere, kTile, kStages, kWarps>;
  static constexpr bool kList = kCopiedKeysHere || kCopiedValuesHere;
  // A tile must lie in one block of the channel grid.
  static constexpr bool kMayBeWide = !kList && !(Keys::kChannelGrid && Keys::kGroup < 32) &&
                                     !(Values::kChannelGrid && Values::kGroup < 32);
  static constexpr int kTile = kMayBeWide && 2 * kWarps * Of<32, 1>::kSlot <= kTilesLimit ? 32 : 16;
  template <int kStages>
  static constexpr bool kFits = Of<kTile, kStages>::kBytes <= kStagesLimit;
  static constexpr int kStages = kList ? 1 : kFits<4> ? 4 : kFits<3> ? 3 : 2;
  using Type = Of<kTile, kStages>;
};

// The passes of a block of kWarps warps, one for each kind of column.
template <int kWarps>
struct Passes {
  using Stored = typename Plan<StoredKeys, StoredValues, false, false, kWarps>::Type;
  using Copied = typename Plan<CopiedKeys, CopiedValues, true, true, kWarps>::Type;
  using WithCopiedKeys = typename Plan<CopiedKeys, StoredValues, true, false, kWarps>::Type;
  using WithCopiedValues = typename Plan<StoredKeys, CopiedValues, false, true, kWarps>::Type;
  static constexpr int kBytes = larger_of(
      larger_of(Stored::kBytes, StoredKeys::kScaled&& StoredValues::kScaled ? Copied::kBytes : 0),
      larger_of(kHasCopiedKeys ? WithCopiedKeys::kBytes : 0,
                kHasCopiedValues ? WithCopiedValues::kBytes : 0));
};

// Half as many warps, and again, until the block's shared memory is within the limit.
template <int kWarps, bool kFits = kWarps == 1 || Passes<kWarps>::kBytes <= kSharedLimit>
constexpr int kFittingWarps = kWarps;
template <int kWarps>
constexpr int kFittingWarps<kWarps, false> = kFittingWarps<kWarps / 2>;

constexpr int kMostWarps = KVQUANT_THREADS / 32;
static_assert(kMostWarps > 0 && (kMostWarps & (kMostWarps - 1)) == 0,
              "KVQUANT_THREADS: 32, 64, 128 or 256");
constexpr int kWarps = kFittingWarps<kMostWarps>;
using ThePasses = Passes<kWarps>;
using StoredPass = ThePasses::Stored;
using CopiedPass = ThePasses::Copied;
using CopiedKeysPass = ThePasses::WithCopiedKeys;
using CopiedValuesPass = ThePasses::WithCopiedValues;
static_assert(kUnit % StoredPass::kTile == 0 && kMostColumns % kUnit == 0,
              "KVQUANT_UNIT: a multiple of 32 that divides KVQUANT_SPLIT");
static_assert(page_holds(StoredPass::kTile) &&
                  page_holds(StoredKeys::kChannelGrid ? StoredKeys::kGroup : 1) &&
                  page_holds(StoredValues::kChannelGrid ? StoredValues::kGroup : 1),
              "KVQUANT_PAGE_LENGTH: whole tiles and blocks of the channel grid");

// Blocks of an SM at once, which its 65536 registers decide: three blocks of 128 threads get 168
// for a thread, two get 255. The sums of values take kShareDim * kRows / 32 of them, those of a tile
// on the channel grid a few more, as do words that are split in parts; rows that are divided take
// their shares' addresses, and models in float32 the second terms of queries.
constexpr int kThatTakeMore = (kRows == 16) + StoredValues::kChannelGrid +
                              (StoredKeys::Codec::kParts > 1 || StoredValues::Codec::kParts > 1);
constexpr int kMostValueDim = kThatTakeMore > 1 ? 64 : 128;
constexpr int kBlocks = kShares == 1 && kShareDim <= kMostValueDim && !kIsFloat32 ? 3 : 2;

template <class P, bool kIsList, class KeyRows, class ValueRows>
KVQUANT_DEVICE void attend(const Place& p, const Columns<kIsList>& columns, const Mask& mask,
                           SharedPtr<uint8_t> memory, const Partials& partials, const KeyRows& keys,
                           const ValueRows& values, int index) {
  P pass(p, columns, mask, memory);
  pass.run(keys, values);
  BlockMerge<P>::write(pass, partials, index);
}

// The state of a slice without columns.
KVQUANT_DEVICE void write_nothing(const Place& p, const Partials& partials, int index) {
  const QueryRows rows(p);
  const int row = thread_index();
  if (!rows.exists(row) || p.share() != 0) return;
  global_store(
      reinterpret_cast<Floats2*>(partials.states) + partials.at(rows.output_row(p, row), index),
      Floats2{-infinity(), 0.0f});
}

}  // namespace kvquant

KVQUANT_KERNEL(decode_attention_kernel, 32 * kvquant::kWarps, kvquant::kBlocks,
               kvquant::ThePasses::kBytes, KVQUANT_ARGUMENT KvquantAttention a, float* partial) {
  using namespace kvquant;
  KVQUANT_DYNAMIC_SHARED(uint8_t, memory);
  let_next_grid_start();
  wait_for_grids();
  const Place p(a);
  const Partials partials(a, partial);
  const int index = block_index_x(), split = index - partials.extra;
  const int split_columns = Splits::columns(a, p.kv_len);
  if (split >= 0 && split * split_columns >= p.kv_len) return;

  const Copies key_copies = Copies::of<StoredKeys>(a.keys, p);
  const Copies value_copies = Copies::of<StoredValues>(a.values, p);
  const StoredRows keys = StoredRows::of<StoredKeys>(a.keys, p);
  const StoredRows values = StoredRows::of<StoredValues>(a.values, p);
  const Mask mask(p);
  const Sinks sinks(p);
  // The copies of the first query begin earliest, those of the last query latest.
  const int k_first = key_copies.dense_from(p.first_position(), p.kv_len);
  const int v_first = value_copies.dense_from(p.first_position(), p.kv_len);
  const int k_last = key_copies.dense_from(p.kv_len - 1, p.kv_len);
  const int v_last = value_copies.dense_from(p.kv_len - 1, p.kv_len);

  if (split >= 0) {
    const int begin = split * split_columns, end = begin + split_columns,
              limit = k_last < v_last ? k_last : v_last;
    const Columns<false> columns(sinks, false, begin, end < limit ? end : limit);
    attend<StoredPass>(p, columns, mask, memory, partials, keys, values, index);
    return;
  }
  const bool copied_keys = index == kCopiedBoth || index == kCopiedKeys;
  const bool copied_values = index == kCopiedBoth || index == kCopiedValues;
  const bool no_sinks = (!copied_keys && key_copies.sink) || (!copied_values && value_copies.sink);
  int begin = 0, end = p.kv_len;
  if (copied_keys && k_first > begin) begin = k_first;
  if (copied_values && v_first > begin) begin = v_first;
  if (!copied_keys && k_last < end) end = k_last;
  if (!copied_values && v_last < end) end = v_last;
  // A tile must lie in one block of the channel grid; the columns that this adds are hidden. A list
  // with stored states on this grid has no sinks.
  const bool in_blocks =
      (!copied_keys && StoredKeys::kChannelGrid) || (!copied_values && StoredValues::kChannelGrid);
  if (in_blocks && begin < end) begin -= begin % CopiedPass::kTile;
  const Columns<true> columns(sinks, !no_sinks, begin, end);
  if (columns.count == 0) return write_nothing(p, partials, index);
  if constexpr (StoredKeys::kScaled && StoredValues::kScaled) {
    if (index == kCopiedBoth) {
      return attend<CopiedPass>(p, columns, mask, memory, partials, key_copies, value_copies,
                                index);
    }
  }
  if constexpr (kHasCopiedKeys) {
    if (index == kCopiedKeys) {
      return attend<CopiedKeysPass>(p, columns, mask, memory, partials, key_copies, values, index);
    }
  }
  if constexpr (kHasCopiedValues) {
    if (index == kCopiedValues) {
      return attend<CopiedValuesPass>(p, columns, mask, memory, partials, keys, value_copies,
                                      index);
    }
  }
  write_nothing(p, partials, index);
}

KVQUANT_KERNEL(merge_splits_kernel, 32 * kvquant::kMergeWarps, 1,
               kvquant::RowMerge<kvquant::kMergeWarps>::kBytes, KVQUANT_ARGUMENT KvquantAttention a,
               const float* partial) {
  using namespace kvquant;
  KVQUANT_DYNAMIC_SHARED(float, memory);
  wait_for_grids();
  const RowMerge<kMergeWarps> merge{a, Partials(a, const_cast<float*>(partial)), memory};
  merge.run(block_index_z(), block_index_y(), block_index_x());
}
