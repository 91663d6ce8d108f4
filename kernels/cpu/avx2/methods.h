// Scores and weighted sums of a tile of columns in dot products of stored codes (dot.h).
//
//   score        2 columns x 4 query rows (or 4 x 2, 8 x 1)    eight sums, one vector each
//                  along head_dim        expand 32 channels (fp8: 16) of each column, multiply with
//                                        each row's weights: the query (channel grid: times the
//                                        scales)
//                totals                  eight vectors -> eight scores; with 4 rows, four times,
//                                        for 8 columns of each row
//   accumulate   16 channels x 4 query rows                    eight sums, one vector each
//                  along the columns     interleave bytes of two columns, widen (fp8: expand those
//                                        of one), multiply with each row's weights: probabilities
//                                        (token grid: times the scales of values)
//
// Channels stay in their order, so neither weights nor sums have to be rearranged. The loops of
// float_tile.h take the rest: dense states, integer formats with float queries, and layouts that
// `takes_tiles` refuses.
#pragma once

#include "cpu/float_methods.h"
#include "keys.h"
#include "values.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Operand, bool kChannel>
KeyMethod dot_keys() {
  using Keys = DotKeys<Operand, kChannel>;
  return {Keys::prepared_bytes, Keys::prepare, Keys::score};
}
template <class Operand, bool kChannel>
ValueMethod dot_values() {
  // Sums in the order of channels.
  ValueMethod method = float_values<TokenRows<typename Operand::Format>>();
  method.accumulate = DotValues<Operand, kChannel>::accumulate;
  return method;
}

inline KeyMethod dot_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kFp8 && takes_tiles(side))
    return channel ? dot_keys<E4M3Operand, true>() : dot_keys<E4M3Operand, false>();
  if (!takes_words(side, dtype)) return float_key_method(side, dtype);
  if (side.format == kInt8)
    return channel ? dot_keys<WordOperand<Unsigned8>, true>()
                   : dot_keys<WordOperand<Signed8>, false>();
  return channel ? dot_keys<WordOperand<Nibble>, true>() : dot_keys<WordOperand<Nibble>, false>();
}
inline ValueMethod dot_value_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kFp8 && takes_tiles(side))
    return channel ? dot_values<E4M3Operand, true>() : dot_values<E4M3Operand, false>();
  if (!takes_words(side, dtype)) return float_value_method(side, dtype);
  if (side.format == kInt8)
    return channel ? dot_values<WordOperand<Unsigned8>, true>()
                   : dot_values<WordOperand<Signed8>, false>();
  return channel ? dot_values<WordOperand<Nibble>, true>()
                 : dot_values<WordOperand<Nibble>, false>();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
