// AVX-512 F, BW, VL, DQ. Without VNNI, 16-bit dot products in vectors of 256 bits are faster than
// float arithmetic in vectors of 512, so int8 and int4 are left to AVX2.
#include "cpu/level.h"

#include "cpu/decode_attention.h"
#include "cpu/paged_read.h"
#include "cpu/quantize_append.h"
#include "cpu/whole_tile.h"

namespace kvquant {

static bool attend_or_leave(const KvquantAttention& a) {
  if (takes_words(a.keys, a.dtype) && takes_words(a.values, a.dtype))
    return kAvx2Level.decode_attention(a);
  return attend<float_key_method, float_value_method>(a);
}

const Level kAvx512Level = {attend_or_leave, quantize_append, paged_read};

}  // namespace kvquant
