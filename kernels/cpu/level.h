// A level is one way to run the operators, compiled for one set of machine instructions.
#pragma once

#include "kvquant/params.h"

namespace kvquant {

struct Level {
  const char* name;
  bool (*decode_attention)(const KvquantAttention&);  // false: out of memory
  bool (*quantize_append)(const KvquantAppend&);
};

extern const Level kScalarLevel, kAvx2Level, kAvx2VnniLevel, kAvx512Level, kAvx512VnniLevel,
    kAvx512Bf16Level;

}  // namespace kvquant
