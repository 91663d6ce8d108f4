// AVX-512 with VNNI, VBMI and BF16: dot products of fp8 codes, too.
#include "bf16.h"
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/quantize_append.h"

namespace kvquant {

const Level kAvx512Bf16Level = {attend<bf16_key_method, bf16_value_method>, quantize_append};

}  // namespace kvquant
