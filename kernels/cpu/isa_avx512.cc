// The level for AVX-512 F, BW, VL, DQ. Without VNNI, 16-bit dot products of 256 bits are faster
// than float arithmetic of 512, so caches of int8 and int4 go the way of AVX2.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"
#include "cpu/tile.h"

namespace kvquant {

const Level kAvx512Level = {"avx512",
                            [](const KvquantAttention& a) {
                              if (takes_words(a.keys, a.dtype) && takes_words(a.values, a.dtype))
                                return kAvx2Level.decode_attention(a);
                              return decode_attention(a, float_key_method(a.keys, a.dtype),
                                                      float_value_method(a.values, a.dtype));
                            },
                            [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
