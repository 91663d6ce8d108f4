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

// kBytes and kNumbers: the precision of weights, of integers and of BF16; 12 bits for pairs do as
// well as the latter.
template <int kBytes, int kNumbers>
KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  constexpr bool kPairs = kNumbers == 1;
  const bool channel = side.grid == kChannelGrid;
  if (takes_tiles(side)) {
    if (side.format == kInt8) {
      return channel ? dot_keys<KeyOperand<Unsigned8, false, kBytes>>()
                     : dot_keys<KeyOperand<Signed8, true, kBytes>>();
    }
    // On the channel grid weights have the blocks' scales, which may differ by more than 12 bits.
    if (side.format == kInt4 && kPairs && !channel) return dot_keys<PairedKeys>();
    if (side.format == kInt4) {
      return channel ? dot_keys<KeyOperand<Nibble, false, kBytes>>()
                     : dot_keys<KeyOperand<Nibble, true, kBytes>>();
    }
#ifdef __AVX512BF16__
    if (side.format == kFp8) {
      // A BF16 query is one BF16 number only as long as nothing is done to it.
      constexpr int kRounded = kNumbers < 2 ? 2 : kNumbers;
      return channel || side.rotate ? dot_keys<E4M3Operand<kRounded>>()
                                    : dot_keys<E4M3Operand<kNumbers>>();
    }
#endif
  }
  return float_key_method(side, dtype);
}
inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_key_method<3, 3>(side, dtype)
         : dtype == kFloat16 ? dot_key_method<2, 2>(side, dtype)
                             : dot_key_method<2, 1>(side, dtype);
}

template <int kBytes, int kNumbers>
ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  constexpr bool kPairs = kNumbers == 1;
  if (takes_tiles(side)) {
    if (side.format == kInt8) return dot_values<ValueOperand<Signed8, kBytes>>();
    if (side.format == kInt4 && kPairs) return dot_values<PairedValues>();
    if (side.format == kInt4) return dot_values<ValueOperand<Nibble, kBytes>>();
#ifdef __AVX512BF16__
    if (side.format == kFp8) return dot_values<E4M3Operand<kNumbers>>();
#endif
  }
  return float_value_method(side, dtype);
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? dot_value_method<3, 3>(side, dtype)
         : dtype == kFloat16 ? dot_value_method<2, 2>(side, dtype)
                             : dot_value_method<2, 1>(side, dtype);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
