// Rules of visibility that every device follows; hf_kvquant/states.py defines them.
#pragma once

#include "kvquant/formats.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// The first position whose exact copy the query at `position` reads from the ring: the last
// recent_length positions, and on the channel grid the whole block that `position` lies in, because
// it is quantized only once it is complete. block_length 1: no blocks.
template <class Int>
KVQUANT_FN Int first_exact(Int position, Int recent_length, Int block_length) {
  const Int recent = position - recent_length + 1;
  const Int block = block_length > 1 ? position - position % block_length : position + 1;
  const Int start = recent < block ? recent : block;
  return start > 0 ? start : 0;
}

// The lowest finite value of an additive mask's dtype. A value x hides its position if x <=
// mask_limit, so a NaN does not hide.
KVQUANT_FN float mask_limit(int64_t mask_kind) {
  return mask_kind == kAddFloat32   ? -3.4028234663852886e38f
         : mask_kind == kAddFloat16 ? -kFp16Max
                                    : -3.3895313892515355e38f;
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
