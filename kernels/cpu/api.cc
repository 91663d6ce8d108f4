// The C interface of the library, and the choice of an instruction set that this processor has.
#include <initializer_list>
#ifdef KVQUANT_X86
#include <cpuid.h>
#endif

#include "cpu/level.h"
#include "cpu/thread_pool.h"

#define KVQUANT_API extern "C" __attribute__((visibility("default")))

namespace {

using kvquant::Level;

// From the oldest instruction set to the newest.
constexpr int kNumLevels = 6;
const char* const kLevelNames[kNumLevels] = {"scalar", "avx2",        "avx2_vnni",
                                             "avx512", "avx512_vnni", "avx512_bf16"};

#ifdef KVQUANT_X86
// Older compilers do not know this feature by name.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

// The operators of instruction set i. Null if this processor does not have all of its instructions,
// or if there is no set i.
const Level* level(int64_t i) {
#ifdef KVQUANT_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  static const bool avx_vnni = has_avx_vnni();  // cpuid is slow on a virtual machine
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 =
      vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  if (i == 1) return avx2 ? &kvquant::kAvx2Level : nullptr;
  if (i == 2) return avx2 && avx_vnni ? &kvquant::kAvx2VnniLevel : nullptr;
  if (i == 3) return avx512 ? &kvquant::kAvx512Level : nullptr;
  if (i == 4) return vnni ? &kvquant::kAvx512VnniLevel : nullptr;
  if (i == 5) return bf16 ? &kvquant::kAvx512Bf16Level : nullptr;
#endif
  return i == 0 ? &kvquant::kScalarLevel : nullptr;
}

enum Status { kDone = 0, kNoLevel = 1, kNoMemory = 2 };

}  // namespace

// The name of instruction set i, or null past the last.
KVQUANT_API const char* kvquant_level_name(int64_t i) {
  return i >= 0 && i < kNumLevels ? kLevelNames[i] : nullptr;
}

// Whether this processor has instruction set i.
KVQUANT_API int kvquant_level_runs(int64_t i) { return level(i) != nullptr; }

// Sizes of the structs, for the host to compare with its own.
KVQUANT_API int64_t kvquant_attention_size() { return sizeof(KvquantAttention); }
KVQUANT_API int64_t kvquant_append_size() { return sizeof(KvquantAppend); }

// From now on the operators run on the threads of the OpenMP runtime whose `GOMP_parallel` is
// given; null: on threads of our own.
KVQUANT_API void kvquant_use_openmp(void* parallel) {
  kvquant::use_openmp(reinterpret_cast<kvquant::OpenMpParallel>(parallel));
}

KVQUANT_API int kvquant_decode_attention(const KvquantAttention* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  KvquantAttention known = *a;
  if (a->length != nullptr && *a->length < a->kv_len) known.kv_len = *a->length;
  return chosen->decode_attention(known) ? kDone : kNoMemory;
}

KVQUANT_API int kvquant_quantize_append(const KvquantAppend* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  KvquantAppend known = *a;
  if (a->length != nullptr) known.start = *a->length;
  for (const KvquantNewTokens* x : {&a->keys, &a->values}) {
    // The host has checked that pages have room.
    if (a->pages == nullptr && known.start + x->n > x->side.capacity) {
      a->faults[1] += x->n;
      return kDone;
    }
  }
  return chosen->quantize_append(known) ? kDone : kNoMemory;
}
