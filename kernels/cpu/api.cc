// The C interface of the library, and the choice of an instruction set that this processor has.
#include <initializer_list>
#ifdef KVQUANT_X86
#include <cpuid.h>
#endif
#if defined(KVQUANT_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(KVQUANT_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/level.h"
#include "cpu/thread_pool.h"

#define KVQUANT_API extern "C" __attribute__((visibility("default")))

namespace {

using kvquant::Level;

// From the oldest instruction set to the newest.
constexpr int kNumLevels = 9;
const char* const kLevelNames[kNumLevels] = {"scalar", "avx2",        "avx2_vnni",
                                             "avx512", "avx512_vnni", "avx512_bf16",
                                             "neon",   "neon_dot",    "neon_i8mm"};

#ifdef KVQUANT_X86
// What the processor and the operating system can do. Not by __builtin_cpu_supports: Zig's answers 0
// to everything, and older compilers do not know every feature.
struct Features {
  bool avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16;

  Features() {
    unsigned a = 0, b1, c1 = 0, d, b7 = 0, c7 = 0, a71 = 0, unused;
    __get_cpuid(1, &a, &b1, &c1, &d);
    __get_cpuid_count(7, 0, &a, &b7, &c7, &d);
    __get_cpuid_count(7, 1, &a71, &unused, &unused, &d);
    // The registers that the operating system saves.
    uint32_t saved = 0;
    if (c1 >> 27 & 1) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    const auto has = [](unsigned word, std::initializer_list<int> bits) {
      for (int bit : bits)
        if (!(word >> bit & 1)) return false;
      return true;
    };
    avx2 =
        has(saved, {1, 2}) && has(c1, {12 /* fma */, 28 /* avx */, 29 /* f16c */}) && has(b7, {5});
    avx_vnni = avx2 && has(a71, {4});
    avx512 = avx2 && has(saved, {5, 6, 7}) &&
             has(b7, {16 /* f */, 17 /* dq */, 30 /* bw */, 31 /* vl */});
    avx512_vnni = avx512 && has(c7, {11});
    avx512_bf16 = avx512_vnni && has(c7, {1 /* vbmi */}) && has(a71, {5});
  }
};
#endif

#ifdef KVQUANT_ARM
// Whether the processor has `sdot`, as every Apple Silicon has.
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
// Whether it has `smmla`, too.
bool has_matrix_products() {
#if defined(__linux__)
  return has_dot_products() && (getauxval(AT_HWCAP2) >> 13 & 1);  // HWCAP2_I8MM
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

// The operators of instruction set i. Null if this processor does not have all of its instructions,
// or if there is no set i.
const Level* level(int64_t i) {
#ifdef KVQUANT_X86
  static const Features has;  // cpuid is slow on a virtual machine
  if (i == 1) return has.avx2 ? &kvquant::kAvx2Level : nullptr;
  if (i == 2) return has.avx_vnni ? &kvquant::kAvx2VnniLevel : nullptr;
  if (i == 3) return has.avx512 ? &kvquant::kAvx512Level : nullptr;
  if (i == 4) return has.avx512_vnni ? &kvquant::kAvx512VnniLevel : nullptr;
  if (i == 5) return has.avx512_bf16 ? &kvquant::kAvx512Bf16Level : nullptr;
#endif
#ifdef KVQUANT_ARM
  if (i == 6) return &kvquant::kNeonLevel;
  if (i == 7) return has_dot_products() ? &kvquant::kNeonDotLevel : nullptr;
  if (i == 8) return has_matrix_products() ? &kvquant::kNeonI8mmLevel : nullptr;
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

// Whether this processor has instruction set i, and it has a kernel for prompts.
KVQUANT_API int kvquant_level_takes_prompts(int64_t i) {
  const Level* chosen = level(i);
  return chosen != nullptr && chosen->prompt_attention != nullptr;
}

// Sizes of the structs, for the host to compare with its own.
KVQUANT_API int64_t kvquant_attention_size() { return sizeof(KvquantAttention); }
KVQUANT_API int64_t kvquant_append_size() { return sizeof(KvquantAppend); }
KVQUANT_API int64_t kvquant_prompt_size() { return sizeof(KvquantPrompt); }
KVQUANT_API int64_t kvquant_read_size() { return sizeof(KvquantRead); }

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

// The same call with other queries and results, and another number of columns: a decode step
// repeats the call of the step before it.
KVQUANT_API int kvquant_decode_attention_again(const KvquantAttention* a, const void* query,
                                               void* output, void* logsumexp, int64_t kv_len) {
  KvquantAttention next = *a;
  next.query = static_cast<const uint8_t*>(query);
  next.output = static_cast<uint8_t*>(output);
  next.logsumexp = static_cast<float*>(logsumexp);
  next.kv_len = kv_len;
  return kvquant_decode_attention(&next);
}

KVQUANT_API int kvquant_quantize_append(const KvquantAppend* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  KvquantAppend known = *a;
  if (a->length != nullptr) known.start = *a->length;
  for (const KvquantNewTokens* x : {&a->keys, &a->values}) {
    // The host has checked that pages have room.
    if (a->pages.table == nullptr && known.start + x->n > x->side.capacity) {
      a->faults[1] += x->n;
      return kDone;
    }
  }
  return chosen->quantize_append(known) ? kDone : kNoMemory;
}

// The same call with other tokens of the same layout, from another column on.
KVQUANT_API int kvquant_quantize_append_again(const KvquantAppend* a, const void* key,
                                              const void* value, int64_t start) {
  KvquantAppend next = *a;
  next.keys.x = static_cast<const uint8_t*>(key);
  next.values.x = static_cast<const uint8_t*>(value);
  next.start = start;
  return kvquant_quantize_append(&next);
}

KVQUANT_API int kvquant_prompt_attention(const KvquantPrompt* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr || chosen->prompt_attention == nullptr) return kNoLevel;
  return chosen->prompt_attention(*a) ? kDone : kNoMemory;
}

KVQUANT_API int kvquant_paged_read(const KvquantRead* a) {
  const Level* chosen = level(a->isa);
  if (chosen == nullptr) return kNoLevel;
  return chosen->paged_read(*a) ? kDone : kNoMemory;
}
