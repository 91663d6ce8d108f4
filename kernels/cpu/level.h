// A level: the operators compiled for one instruction set. Each has a level.cc in the folder of its
// instruction set, compiled with that folder on the include path: "vec.h" is the instruction set's.
#pragma once

#include "kvquant/params.h"

namespace kvquant {

struct Level {
  bool (*decode_attention)(const KvquantAttention&);  // false: out of memory
  bool (*quantize_append)(const KvquantAppend&);
};

extern const Level kScalarLevel, kAvx2Level, kAvx2VnniLevel, kAvx512Level, kAvx512VnniLevel,
    kAvx512Bf16Level;

}  // namespace kvquant
