// 64-bit ARM with the instruction for products of matrices of bytes.
#include "cpu/decode_attention.h"
#include "cpu/level.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "methods.h"

namespace kvquant {

const Level kNeonI8mmLevel = {attend<dot_key_method, dot_value_method>, quantize_append,
                              paged_read};

}  // namespace kvquant
