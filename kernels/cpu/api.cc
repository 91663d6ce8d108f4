// The C interface of the library, and the choice of the level.
#include <cstring>

#include "cpu/level.h"

#define KVQUANT_API extern "C" __attribute__((visibility("default")))

namespace {

using kvquant::Level;

// In ascending order; a level that this processor lacks is null.
constexpr int kNumLevels = 3;
const char* const kLevelNames[kNumLevels] = {"scalar", "avx2", "avx512"};

const Level* level(int64_t i) {
#ifdef KVQUANT_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (i == 1) return avx2 ? &kvquant::kAvx2Level : nullptr;
  if (i == 2) return avx512 ? &kvquant::kAvx512Level : nullptr;
#endif
  return i == 0 ? &kvquant::kScalarLevel : nullptr;
}

enum Status { kDone = 0, kNoLevel = 1, kNoMemory = 2 };

}  // namespace

// The name of level i, or null past the last.
KVQUANT_API const char* kvquant_level_name(int64_t i) {
  return i >= 0 && i < kNumLevels ? kLevelNames[i] : nullptr;
}

// Whether this processor has level i.
KVQUANT_API int kvquant_level_runs(int64_t i) { return level(i) != nullptr; }

// Sizes of the structs, so that the two sides of the border can be compared.
KVQUANT_API int64_t kvquant_attention_size() { return sizeof(KvquantAttention); }
KVQUANT_API int64_t kvquant_append_size() { return sizeof(KvquantAppend); }

KVQUANT_API int kvquant_decode_attention(const KvquantAttention* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  return chosen->decode_attention(*a) ? kDone : kNoMemory;
}

KVQUANT_API int kvquant_quantize_append(const KvquantAppend* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  return chosen->quantize_append(*a) ? kDone : kNoMemory;
}
