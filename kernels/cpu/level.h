// A `Level` holds the operators as compiled for one instruction set. It is defined in level*.cc in
// the folder of that instruction set. The folder is on the file's include path, so every "vec.h"
// that the file includes, directly or not, is the one of its instruction set.
#pragma once

#include "kvquant/params.h"

namespace kvquant {

struct Level {
  bool (*decode_attention)(const KvquantAttention&);  // false: out of memory
  bool (*quantize_append)(const KvquantAppend&);
  bool (*paged_read)(const KvquantRead&);
  // Null if the instruction set has no kernel for it.
  bool (*prompt_attention)(const KvquantPrompt&) = nullptr;
};

extern const Level kScalarLevel, kAvx2Level, kAvx2VnniLevel, kAvx512Level, kAvx512VnniLevel,
    kAvx512Bf16Level, kNeonLevel, kNeonDotLevel, kNeonI8mmLevel;

}  // namespace kvquant
