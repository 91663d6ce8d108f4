// AVX2 with AVX-VNNI, which has an instruction for the 16-bit dot product.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "methods.h"

namespace kvquant {

const Level kAvx2VnniLevel = {attend<dot_key_method, dot_value_method>, quantize_append,
                              paged_read};

}  // namespace kvquant
