// The level for AVX-512 with VNNI, VBMI and BF16: dot products of fp8 codes, too.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"
#include "cpu/tile_dot.h"

namespace kvquant {

const Level kAvx512Bf16Level = {"avx512_bf16",
                                [](const KvquantAttention& a) {
                                  return decode_attention(a, dot_key_method(a.keys, a.dtype),
                                                          dot_value_method(a.values, a.dtype));
                                },
                                [](const KvquantAppend& a) { return quantize_append(a); }};

}  // namespace kvquant
