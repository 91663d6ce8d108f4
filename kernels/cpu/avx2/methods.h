// Scores and weighted sums of a tile of columns in 16-bit dot products of stored codes (dot.h).
//
//   score        2 columns x 4 query rows (or 4 x 2, 8 x 1)    eight sums, one vector each
//                  along head_dim        widen 32 channels of each column, multiply with each row's
//                                        weights: the query (channel grid: times the scales)
//                totals                  eight vectors -> eight scores; with 4 rows, four times,
//                                        for 8 columns of each row
//   accumulate   16 channels x 4 query rows                    eight sums, one vector each
//                  along the columns     interleave bytes of two columns, widen, multiply with each
//                                        row's pair of weights: probabilities (token grid: times
//                                        the scales of values)
//
// Channels stay in their order, so neither weights nor sums have to be rearranged. The loops of
// float_tile.h take everything that `takes_words` refuses, float queries and fp8 for instance.
#pragma once

#include "cpu/float_methods.h"
#include "keys.h"
#include "values.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Format, bool kChannel>
KeyMethod word_keys() {
  using Keys = WordKeys<Format, kChannel>;
  return {Keys::prepared_bytes, Keys::prepare, Keys::score};
}
template <class Format, bool kChannel>
ValueMethod word_values() {
  ValueMethod method = float_values<TokenRows<Format>>();  // sums in the order of channels
  method.accumulate = WordValues<Format, kChannel>::accumulate;
  return method;
}

inline KeyMethod word_key_method(const KvquantSide& side, int64_t dtype) {
  if (!takes_words(side, dtype)) return float_key_method(side, dtype);
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kInt8)
    return channel ? word_keys<Unsigned8, true>() : word_keys<Signed8, false>();
  return channel ? word_keys<Nibble, true>() : word_keys<Nibble, false>();
}
inline ValueMethod word_value_method(const KvquantSide& side, int64_t dtype) {
  if (!takes_words(side, dtype)) return float_value_method(side, dtype);
  const bool channel = side.grid == kChannelGrid;
  if (side.format == kInt8)
    return channel ? word_values<Unsigned8, true>() : word_values<Signed8, false>();
  return channel ? word_values<Nibble, true>() : word_values<Nibble, false>();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
