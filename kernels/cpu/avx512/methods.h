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

#include "cpu/float_methods.h"
#include "keys.h"
#include "values.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Operand>
KeyMethod quad_keys() {
  return {QuadKeys<Operand>::prepared_bytes, QuadKeys<Operand>::prepare, QuadKeys<Operand>::score};
}
template <class Operand>
ValueMethod quad_values() {
  return {QuadValues<Operand>::accumulate, QuadValues<Operand>::acc_floats,
          QuadValues<Operand>::finish};
}

// n: the precision of weights, bytes of whole numbers and BF16 numbers. BF16 queries: 12 bits do
// for pairs, and a query to which nothing was done is one BF16 number.
template <int n, bool kBf16Query = false>
KeyMethod quad_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (takes_tiles(side)) {
    if (side.format == kInt8) {
      return channel ? quad_keys<KeyOperand<Unsigned8, false, n>>()
                     : quad_keys<KeyOperand<Signed8, true, n>>();
    }
    // On the channel grid weights have the blocks' scales, which may differ by more than 12 bits.
    if (side.format == kInt4 && kBf16Query && !channel) return quad_keys<PairedKeys>();
    if (side.format == kInt4) {
      return channel ? quad_keys<KeyOperand<Nibble, false, n>>()
                     : quad_keys<KeyOperand<Nibble, true, n>>();
    }
  }
  return float_key_method(side, dtype);
}
inline KeyMethod quad_key_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? quad_key_method<3>(side, dtype)
         : dtype == kFloat16 ? quad_key_method<2>(side, dtype)
                             : quad_key_method<2, true>(side, dtype);
}

template <int n, bool kBf16Query = false>
ValueMethod quad_value_method(const KvquantSide& side, int64_t dtype) {
  if (takes_tiles(side)) {
    if (side.format == kInt8) return quad_values<ValueOperand<Signed8, n>>();
    if (side.format == kInt4 && kBf16Query) return quad_values<PairedValues>();
    if (side.format == kInt4) return quad_values<ValueOperand<Nibble, n>>();
  }
  return float_value_method(side, dtype);
}
inline ValueMethod quad_value_method(const KvquantSide& side, int64_t dtype) {
  return dtype == kFloat32   ? quad_value_method<3>(side, dtype)
         : dtype == kFloat16 ? quad_value_method<2>(side, dtype)
                             : quad_value_method<2, true>(side, dtype);
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
