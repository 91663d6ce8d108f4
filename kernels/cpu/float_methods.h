// A method is the set of functions that score the keys, or sum up the values, of one format.
// Methods are function pointers, so that no code is compiled for pairs of a key format and a value
// format. This file has the methods in float arithmetic, for every format.
#pragma once

#include "cpu/float_tile.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

struct KeyMethod {
  // Bytes that `prepare` writes for the query rows q `[rows, head_dim]`.
  size_t (*prepared_bytes)(const Body& keys, int rows);
  void (*prepare)(const Body& keys, const float* q, int rows, void* prepared);
  // scores[r][i] = q[r] . keys[first + i] for every bit i < n that is set in `columns`. The other
  // scores are undefined.
  void (*score)(const Body& keys, int64_t first, int n, uint64_t columns, const float* q,
                void* prepared, int rows, float* scores);
};

struct ValueMethod {
  // acc[r] += the sum of p[r][i] * values[first + i] over the bits set in columns[r]. The method
  // chooses the order of the channels in `acc`, and how many floats a row of it has.
  void (*accumulate)(const Body& values, int64_t first, int n, const uint64_t* columns,
                     const float* p, int rows, float* acc);
  size_t (*acc_floats)(const Body& values);
  // Puts the sums in the rows of `acc` into the order of the channels.
  void (*finish)(const Body& values, int rows, float* acc);
};

template <class Codec>
KeyMethod float_keys() {
  return {
      [](const Body&, int) -> size_t { return 0; }, [](const Body&, const float*, int, void*) {},
      [](const Body& keys, int64_t first, int n, uint64_t columns, const float* q, void*, int rows,
         float* scores) { score_tile(Codec(keys, first, n), columns, q, rows, scores); }};
}

template <class Codec>
ValueMethod float_values() {
  return {
      [](const Body& values, int64_t first, int n, const uint64_t* columns, const float* p,
         int rows, float* acc) { accumulate_tile(Codec(values, first, n), columns, p, rows, acc); },
      [](const Body& values) -> size_t { return size_t(values.head_dim); },
      [](const Body&, int, float*) {}};
}

inline KeyMethod float_key_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  switch (side.format) {
    case kInt8:
      return channel ? float_keys<ChannelRows<Unsigned8>>() : float_keys<TokenRows<Signed8>>();
    case kFp8:
      return channel ? float_keys<ChannelRows<E4M3>>() : float_keys<TokenRows<E4M3>>();
    case kInt4:
    case kInt3:  // expanded to nibbles
    case kInt2:
      return channel ? float_keys<ChannelRows<Nibble>>() : float_keys<TokenRows<Nibble>>();
    default:
      return dtype == kFloat32   ? float_keys<DenseRows<float>>()
             : dtype == kFloat16 ? float_keys<DenseRows<Half>>()
                                 : float_keys<DenseRows<BFloat16>>();
  }
}

inline ValueMethod float_value_method(const KvquantSide& side, int64_t dtype) {
  const bool channel = side.grid == kChannelGrid;
  switch (side.format) {
    case kInt8:
      return channel ? float_values<ChannelRows<Unsigned8>>() : float_values<TokenRows<Signed8>>();
    case kFp8:
      return channel ? float_values<ChannelRows<E4M3>>() : float_values<TokenRows<E4M3>>();
    case kInt4:
    case kInt3:  // expanded to nibbles
    case kInt2:
      return channel ? float_values<ChannelRows<Nibble>>() : float_values<TokenRows<Nibble>>();
    default:
      return dtype == kFloat32   ? float_values<DenseRows<float>>()
             : dtype == kFloat16 ? float_values<DenseRows<Half>>()
                                 : float_values<DenseRows<BFloat16>>();
  }
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
