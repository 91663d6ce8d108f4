// A level is the operators, compiled for one instruction set: the file level*.cc in the folder of
// the instruction set. That folder is on the file's include path, so "vec.h" is the one of the
// instruction set wherever it is included.
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
