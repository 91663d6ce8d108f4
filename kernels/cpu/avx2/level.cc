// AVX2, FMA and F16C: dot products of stored codes, of 16-bit integers (int8, int4) or floats (fp8).
#include "cpu/level.h"

#include "cpu/decode_attention.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "methods.h"

namespace kvquant {

const Level kAvx2Level = {attend<dot_key_method, dot_value_method>, quantize_append, paged_read};

}  // namespace kvquant
