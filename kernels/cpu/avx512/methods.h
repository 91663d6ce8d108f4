// Scores and weighted sums of a tile of columns in dot products of stored codes (dot.h).
//
// A vector holds four inputs for each of sixteen outputs. It is made in registers from the stored
// rows, and multiplied by a quad of weights of each query row. The loads and shuffles of the next
// vector run beside the multiplications:
//
//   score        16 outputs: columns    4 inputs: channels
//                weights: the query (channel grid: times the scales)
//                16 bytes of each of 16 columns -> transpose quads -> 4 vectors of 4 channels
//   accumulate   16 outputs: channels   4 inputs: columns
//                weights: probabilities x scales of values
//                64 bytes of each of 4 columns -> interleave bytes -> 4 vectors of 16 channels
//
// Nibbles may be multiplied in pairs (`PairDot`): score pairs the channels that share a byte;
// accumulate pairs columns i and i + 16.
//
// The instruction multiplies unsigned by signed bytes. In scores the codes are unsigned: signed
// ones are shifted (xor 128), and an offset x the sum of weights is subtracted in the end. In
// weighted sums the weights are unsigned, because probabilities are never negative; but if nibbles
// are paired, the codes are.
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

// n: the bytes of a weight. For BF16 queries the 12 bits of paired nibbles suffice.
template <int n, bool kBf16Query = false>
KeyMethod quad_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (takes_tiles(side)) {
    if (side.format == kInt8) {
      return channel ? quad_keys<KeyOperand<Unsigned8, false, n>>()
                     : quad_keys<KeyOperand<Signed8, true, n>>();
    }
    // On the channel grid the weights contain the scales, which may differ by more than 12 bits.
    if (is_packed(side.format) && kBf16Query && !channel) return quad_keys<PairedKeys>();
    if (is_packed(side.format)) {
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
  const bool channel = side.grid == kChannelGrid;
  if (takes_tiles(side) && !(channel && is_packed(side.format) && side.head_dim % 32)) {
    if (side.format == kInt8) {
      return channel ? quad_values<ValueOperand<Unsigned8, n>>()
                     : quad_values<ValueOperand<Signed8, n>>();
    }
    if (is_packed(side.format) && kBf16Query) return quad_values<PairedValues>();
    if (is_packed(side.format)) return quad_values<ValueOperand<Nibble, n>>();
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
