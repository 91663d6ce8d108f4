// Plain C++, for any machine.
#include "cpu/level.h"

#include "cpu/decode_attention.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"

namespace kvquant {

const Level kScalarLevel = {attend<float_key_method, float_value_method>, quantize_append,
                            paged_read};

}  // namespace kvquant
