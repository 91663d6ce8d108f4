// AVX2, FMA and F16C: 16-bit dot products of int8 and int4 codes.
#include "cpu/level.h"

#include "cpu/decode_attention.h"
#include "cpu/quantize_append.h"
#include "methods.h"

namespace kvquant {

const Level kAvx2Level = {attend<word_key_method, word_value_method>, quantize_append};

}  // namespace kvquant
