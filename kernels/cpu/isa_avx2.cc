// The level for AVX2, FMA and F16C.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"

namespace kvquant {

const Level kAvx2Level = {"avx2",
                          [](const KvquantAttention& a) {
                            return decode_attention(a, float_key_method(a.keys, a.dtype),
                                                    float_value_method(a.values, a.dtype));
                          },
                          [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
