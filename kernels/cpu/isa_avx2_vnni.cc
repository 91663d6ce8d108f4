// The level for AVX2, FMA and F16C with AVX-VNNI: the same as for AVX2, with its dot product.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"
#include "cpu/tile_dot_avx2.h"

namespace kvquant {

const Level kAvx2VnniLevel = {"avx2_vnni",
                              [](const KvquantAttention& a) {
                                return decode_attention(a, dot_key_method(a.keys, a.dtype),
                                                        dot_value_method(a.values, a.dtype));
                              },
                              [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
