// AVX-512 with VNNI, VBMI and BF16: dot products of fp8 codes, too, and exact attention of prompts.
#include "bf16.h"
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "prompt.h"

namespace kvquant {

const Level kAvx512Bf16Level = {attend<bf16_key_method, bf16_value_method>, quantize_append,
                                paged_read, prompt_attention};

}  // namespace kvquant
