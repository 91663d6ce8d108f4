// The level for AVX-512 F, BW, VL, DQ, VNNI: dot products of int8 and int4 codes.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"
#include "cpu/tile_dot.h"

namespace kvquant {

const Level kAvx512VnniLevel = {"avx512_vnni",
                                [](const KvquantAttention& a) {
                                  return decode_attention(a, dot_key_method(a.keys, a.dtype),
                                                          dot_value_method(a.values, a.dtype));
                                },
                                [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
