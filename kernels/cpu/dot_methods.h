// Methods in dot products of stored codes, for AVX2 and NEON; methods.h of each draws its loops.
#pragma once

#include "cpu/dot_keys.h"
#include "cpu/dot_values.h"
#include "cpu/float_methods.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Operand, bool kChannel>
KeyMethod dot_keys() {
  using Keys = DotKeys<Operand, kChannel>;
  return {Keys::prepared_bytes, Keys::prepare, Keys::score};
}
template <class Operand, bool kChannel>
ValueMethod dot_values() {
  using Values = DotValues<Operand, kChannel>;
  return {Values::accumulate, [](const Body& values) -> size_t { return size_t(values.head_dim); },
          Values::finish};
}

// The loops of float_tile.h take the rest: dense states, integer formats with float queries, and
// layouts that `takes_tiles` refuses.
inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kFp8 && takes_tiles(side))
    return channel ? dot_keys<E4M3Operand, true>() : dot_keys<E4M3Operand, false>();
  if (!takes_words(side, dtype)) return float_key_method(side, dtype);
  if (side.format == kInt8)
    return channel ? dot_keys<IntOperand<Unsigned8>, true>()
                   : dot_keys<IntOperand<Signed8>, false>();
  return channel ? dot_keys<IntOperand<Nibble>, true>() : dot_keys<IntOperand<Nibble>, false>();
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kFp8 && takes_tiles(side))
    return channel ? dot_values<E4M3Operand, true>() : dot_values<E4M3Operand, false>();
  if (!takes_words(side, dtype)) return float_value_method(side, dtype);
  if (side.format == kInt8)
    return channel ? dot_values<IntOperand<Unsigned8>, true>()
                   : dot_values<IntOperand<Signed8>, false>();
  return channel ? dot_values<IntOperand<Nibble>, true>() : dot_values<IntOperand<Nibble>, false>();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
