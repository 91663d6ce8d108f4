// Scores of, and weighted sums over, a tile of columns in dot products of stored codes.
//
// Four inputs of sixteen outputs are one vector; it is made in registers from the stored rows and
// multiplied with four weights of each query row, while the loads, shuffles and shifts of the next
// one go on beside the multiplications:
//
//   score        outputs: 16 columns    inputs: channels   weights: the query, scales folded in
//                  16 bytes of each of 16 columns -> transpose quads -> 4 vectors of 4 channels
//   accumulate   outputs: channels      inputs: columns    weights: probabilities x values' scales
//                  64 bytes of each of 4 columns -> interleave bytes -> 4 vectors of 16 channels
//
// Nibbles that are multiplied in pairs (`PairDot`): score has 4 pairs of channels in a vector, as
// they are stored; accumulate pairs columns i and i + 16.
//
// The instruction takes one operand without signs. Of keys that is the codes: symmetric ones have
// an offset (xor 128, or the nibble as it is), which comes off as offset x the sum of the weights.
// Of values it is the weights, which are never negative; of pairs the codes again.
#pragma once

#include "cpu/dot_keys.h"
#include "cpu/dot_operands.h"
#include "cpu/dot_values.h"
#include "cpu/methods.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Operand>
KeyMethod dot_keys() {
  return {DotKeys<Operand>::prepared_bytes, DotKeys<Operand>::prepare, DotKeys<Operand>::score};
}
template <class Operand>
ValueMethod dot_values() {
  return {DotValues<Operand>::accumulate, DotValues<Operand>::acc_floats,
          DotValues<Operand>::finish};
}

// n: the precision of weights, bytes of whole numbers and BF16 numbers. BF16 queries: 12 bits do
// for pairs, and a query to which nothing was done is one BF16 number.
template <int n, bool kBf16Query = false>
KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (takes_tiles(side)) {
    if (side.format == kInt8) {
      return channel ? dot_keys<KeyOperand<Unsigned8, false, n>>()
                     : dot_keys<KeyOperand<Signed8, true, n>>();
    }
    // On the channel grid weights have the blocks' scales, which may differ by more than 12 bits.
    if (side.format == kInt4 && kBf16Query && !channel) return dot_keys<PairedKeys>();
    if (side.format == kInt4) {
      return channel ? dot_keys<KeyOperand<Nibble, false, n>>()
                     : dot_keys<KeyOperand<Nibble, true, n>>();
    }
#ifdef __AVX512BF16__
    if (side.format == kFp8) {
      return kBf16Query && !channel && !side.rotate ? dot_keys<E4M3Operand<1>>()
                                                    : dot_keys<E4M3Operand<n>>();
    }
#endif
  }
  return float_key_method(side, dtype);
}
inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_key_method<3>(side, dtype)
         : dtype == kFloat16 ? dot_key_method<2>(side, dtype)
                             : dot_key_method<2, true>(side, dtype);
}

template <int n, bool kBf16Query = false>
ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  if (takes_tiles(side)) {
    if (side.format == kInt8) return dot_values<ValueOperand<Signed8, n>>();
    if (side.format == kInt4 && kBf16Query) return dot_values<PairedValues>();
    if (side.format == kInt4) return dot_values<ValueOperand<Nibble, n>>();
#ifdef __AVX512BF16__
    if (side.format == kFp8) return dot_values<E4M3Operand<n>>();
#endif
  }
  return float_value_method(side, dtype);
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_value_method<3>(side, dtype)
         : dtype == kFloat16 ? dot_value_method<2>(side, dtype)
                             : dot_value_method<2, true>(side, dtype);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
