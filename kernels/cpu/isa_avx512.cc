// The level for AVX-512 F, BW, VL, DQ.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"

namespace kvquant {

const Level kAvx512Level = {"avx512",
                            [](const KvquantAttention& a) {
                              return decode_attention(a, float_key_method(a.keys, a.dtype),
                                                      float_value_method(a.values, a.dtype));
                            },
                            [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
