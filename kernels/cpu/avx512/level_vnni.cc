// AVX-512 F, BW, VL, DQ and VNNI: dot products of int8 and int4 codes, byte by byte.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "methods.h"

namespace kvquant {

const Level kAvx512VnniLevel = {attend<quad_key_method, quad_value_method>, quantize_append,
                                paged_read};

}  // namespace kvquant
