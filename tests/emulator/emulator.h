// The names of kernels/cuda/primitives.h for the host: that file includes this one when
// KVQUANT_EMULATOR is defined, and explains each name.
#pragma once

#include <math.h>

#include "machine.h"
#include "numbers.h"
#include "warp.h"

#ifndef KVQUANT_ARCH
#define KVQUANT_ARCH 800
#endif

#define KVQUANT_DEVICE inline
#define KVQUANT_ARGUMENT const
#define KVQUANT_KERNEL(name, threads, blocks_per_sm, shared_bytes, ...)                           \
  static void name(__VA_ARGS__);                                                                  \
  extern "C" {                                                                                    \
  __attribute__((visibility("default"))) int name##_launch[2] = {threads, shared_bytes};          \
  }                                                                                               \
  extern "C" __attribute__((visibility("default"))) int kvquant_emulate_##name(                   \
      const kvquant::emulator::Launch* launch, void* const* arguments, char* message, int size) { \
    const auto body = [](void* const* arguments) { kvquant::emulator::call(name, arguments); };   \
    return kvquant::emulator::run(#name, *launch, body, arguments, message, size);                \
  }                                                                                               \
  static void name(__VA_ARGS__)
#define KVQUANT_SHARED(type, name, n)         \
  static const kvquant::SharedPtr<type> name( \
      kvquant::emulator::allocate_shared(#name, sizeof(type) * (n)))
#define KVQUANT_DYNAMIC_SHARED(type, name) kvquant::SharedPtr<type> name(0)

namespace kvquant {
namespace emulator {

template <int... kIndex>
struct Indices {};
template <int n, int... kIndex>
struct CountTo : CountTo<n - 1, n - 1, kIndex...> {};
template <int... kIndex>
struct CountTo<0, kIndex...> {
  using Result = Indices<kIndex...>;
};
template <class... A, int... kIndex>
void call(void (*kernel)(A...), void* const* arguments, Indices<kIndex...>) {
  kernel(*static_cast<A*>(arguments[kIndex])...);
}
// Calls the kernel with the values that `arguments` point to.
template <class... A>
void call(void (*kernel)(A...), void* const* arguments) {
  call(kernel, arguments, typename CountTo<sizeof...(A)>::Result());
}

template <class T>
struct RemoveConst {
  using Type = T;
};
template <class T>
struct RemoveConst<const T> {
  using Type = T;
};

}  // namespace emulator

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

// An index, and the source line that uses it.
struct Index {
  template <class Integer>
  Index(Integer i, KVQUANT_SITE) : value(int32_t(i)), site(site) {}
  int32_t value;
  emulator::Site site;
};

// One element in shared memory: every read and write of it is checked.
template <class T>
class SharedRef {
 public:
  using Value = typename emulator::RemoveConst<T>::Type;

  SharedRef(uint32_t address, emulator::Site site) : address_(address), site_(site) {}
  SharedRef(const SharedRef&) = delete;
  operator Value() const {
    Value x;
    emulator::shared_read(address_, &x, sizeof(x), site_);
    return x;
  }
  void operator=(Value x) { emulator::shared_write(address_, &x, sizeof(x), site_); }
  void operator=(const SharedRef& other) { *this = Value(other); }
  void operator+=(Value x) { *this = Value(*this) + x; }
  void operator*=(Value x) { *this = Value(*this) * x; }
  void operator|=(Value x) { *this = Value(*this) | x; }

 private:
  uint32_t address_;
  emulator::Site site_;
};

template <class T>
class SharedPtr {
 public:
  SharedPtr() = default;
  explicit SharedPtr(uint32_t address) : address_(address) {}
  SharedRef<T> operator[](Index i) const {
    return {address_ + uint32_t(i.value) * uint32_t(sizeof(T)), i.site};
  }
  SharedRef<T> operator*() const { return {address_, {"a dereference", 0}}; }
  SharedPtr operator+(int i) const { return SharedPtr(address_ + uint32_t(i) * sizeof(T)); }
  SharedPtr operator-(int i) const { return *this + -i; }
  int operator-(SharedPtr other) const { return int(address_ - other.address_) / int(sizeof(T)); }
  SharedPtr& operator+=(int i) { return *this = *this + i; }
  operator SharedPtr<const T>() const { return SharedPtr<const T>(address_); }
  uint32_t address() const { return address_; }

 private:
  uint32_t address_ = 0;
};
template <class U, class T>
SharedPtr<U> shared_cast(SharedPtr<T> p) {
  return SharedPtr<U>(p.address());
}

// -- where a thread stands, and barriers --------------------------------------------------------

inline int thread_index() { return emulator::place.thread; }
inline int lane_index() { return emulator::place.thread % 32; }
inline int warp_index() { return emulator::place.thread / 32; }
inline int block_index_x() { return emulator::place.block[0]; }
inline int block_index_y() { return emulator::place.block[1]; }
inline int block_index_z() { return emulator::place.block[2]; }
inline int grid_size_x() { return emulator::launch().grid[0]; }
inline int grid_size_y() { return emulator::launch().grid[1]; }
inline int grid_size_z() { return emulator::launch().grid[2]; }
inline void block_barrier(KVQUANT_SITE) { emulator::block_barrier(site); }
inline void warp_barrier(KVQUANT_SITE) { emulator::warp_barrier(site); }
inline void wait_for_grids() { emulator::wait_for_grids(); }
inline void let_next_grid_start() {}  // whenever the next one starts, it has to wait

// -- votes and shuffles --------------------------------------------------------------------------

inline uint32_t warp_ballot(bool x, KVQUANT_SITE) {
  return emulator::ballot("warp_ballot", x, site);
}
inline bool warp_any(bool x, KVQUANT_SITE) { return emulator::ballot("warp_any", x, site) != 0; }
template <class T>
T shuffle(T x, int lane, KVQUANT_SITE) {
  const auto bits = emulator::bit_cast<uint32_t>(x);
  return emulator::bit_cast<T>(emulator::shuffle("shuffle", bits, lane, site));
}
template <class T>
T shuffle_xor(T x, int mask, KVQUANT_SITE) {
  const auto bits = emulator::bit_cast<uint32_t>(x);
  return emulator::bit_cast<T>(emulator::shuffle("shuffle_xor", bits, lane_index() ^ mask, site));
}

// -- global memory -------------------------------------------------------------------------------

template <class T>
T global_load(const T* p, KVQUANT_SITE) {
  emulator::global_access(p, sizeof(T), emulator::Access::kRead, site);
  return *p;
}
template <class T>
void global_store(T* p, T x, KVQUANT_SITE) {
  emulator::global_access(p, sizeof(T), emulator::Access::kWrite, site);
  *p = x;
}
template <class T>
T global_load_relaxed(const T* p, KVQUANT_SITE) {
  emulator::global_access(p, sizeof(*p), emulator::Access::kAtomicRead, site);
  return *p;
}
template <class T>
void global_store_relaxed(T* p, T x, KVQUANT_SITE) {
  emulator::global_access(p, sizeof(*p), emulator::Access::kAtomicWrite, site);
  *p = x;
}
inline void atomic_add(int64_t* p, int64_t x, KVQUANT_SITE) {
  emulator::global_access(p, sizeof(*p), emulator::Access::kAtomicWrite, site);
  *p += x;
}
inline int64_t atomic_add_in_order(int64_t* p, int64_t x, KVQUANT_SITE) {
  atomic_add(p, x, site);
  return *p - x;
}
inline Words4 load_16(const void* p, KVQUANT_SITE) {
  return global_load(static_cast<const Words4*>(p), site);
}
inline Words4 load_16_once(const void* p, KVQUANT_SITE) {
  return global_load(static_cast<const Words4*>(p), site);
}
inline void store_16(void* p, Words4 x, KVQUANT_SITE) {
  global_store(static_cast<Words4*>(p), x, site);
}

// -- asynchronous copies --------------------------------------------------------------------------

template <class T>
void cp_async_16(SharedPtr<T> to, const void* from, KVQUANT_SITE) {
  emulator::copy_async(to.address(), from, 16, true, site);
}
template <class T>
void cp_async_16(SharedPtr<T> to, const void* from, bool valid, KVQUANT_SITE) {
  emulator::copy_async(to.address(), from, 16, valid, site);
}
template <class T>
void cp_async_8(SharedPtr<T> to, const void* from, bool valid, KVQUANT_SITE) {
  emulator::copy_async(to.address(), from, 8, valid, site);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int N>
void cp_async_wait() {
  emulator::copy_wait(N);
}

// -- matrices -------------------------------------------------------------------------------------

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], SharedPtr<T> row, KVQUANT_SITE) {
  emulator::ldmatrix(r, false, row.address(), site);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], SharedPtr<T> row, KVQUANT_SITE) {
  emulator::ldmatrix(r, true, row.address(), site);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             KVQUANT_SITE) {
  emulator::mma_m16n8k16(c, a, b, false, site);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              KVQUANT_SITE) {
  emulator::mma_m16n8k16(c, a, b, true, site);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             KVQUANT_SITE) {
  emulator::mma_m16n8k8_tf32(c, a, b, site);
}

inline uint32_t transpose_8x8(uint32_t x, KVQUANT_SITE) {
  const int row = 2 * (lane_index() % 4), column = lane_index() / 4;
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i) {
    const int from = 4 * (row + i) + column / 2;
    r |= (emulator::shuffle("transpose_8x8", x, from, site) >> 16 * (column % 2) & 0xffffu)
         << 16 * i;
  }
  return r;
}

// -- words ----------------------------------------------------------------------------------------

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256, "a table of eight bits");
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return r;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t source = selector >> 4 * i & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (source & 7)) & 0xff;
    if (source & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, eight times
    r |= byte << 8 * i;
  }
  return r;
}

inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

// -- FP16 and BF16 pairs --------------------------------------------------------------------------

inline uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  return emulator::on_pairs(emulator::half_fma, a, b, c);
}
inline uint32_t hmul2(uint32_t a, uint32_t b) { return hfma2(a, b, 0x80008000u); }
inline uint32_t hsub2(uint32_t a, uint32_t b) { return hfma2(b, 0xbc00bc00u, a); }
inline uint32_t pack_half2(float low, float high) {
  return emulator::to_half(low) | uint32_t(emulator::to_half(high)) << 16;
}
inline uint32_t pack_bfloat162(float low, float high) {
  return emulator::to_bfloat16(low) | uint32_t(emulator::to_bfloat16(high)) << 16;
}
inline float half_low(uint32_t x) { return emulator::half_to_float(uint16_t(x)); }
inline float half_high(uint32_t x) { return emulator::half_to_float(uint16_t(x >> 16)); }
inline float bfloat16_low(uint32_t x) { return emulator::bfloat16_to_float(uint16_t(x)); }
inline float bfloat16_high(uint32_t x) { return emulator::bfloat16_to_float(uint16_t(x >> 16)); }
#if KVQUANT_ARCH >= 890
inline uint32_t pack_e4m3x2(float low, float high) {
  return emulator::to_e4m3(low) | uint32_t(emulator::to_e4m3(high)) << 8;
}
inline uint32_t e4m3x2_low(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i) {
    // FP16 with one bit less of exponent and a bias that is 8 smaller.
    const uint32_t byte = x >> 8 * i & 0xffu, half = (byte & 0x80u) << 8 | (byte & 0x7fu) << 7;
    const bool is_nan = (byte & 0x7fu) == 0x7fu;
    r |= (is_nan ? 0x7fffu : hfma2(half, 0x5c005c00u, 0x80008000u) & 0xffffu) << 16 * i;
  }
  return r;
}
inline uint32_t e4m3x2_high(uint32_t x) { return e4m3x2_low(x >> 16); }
#endif

// -- float ----------------------------------------------------------------------------------------

inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rcp_rn(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return isnan(a) || isnan(b) ? a + b : fmaxf(a, b); }
inline uint32_t float_bits(float x) { return emulator::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return emulator::bit_cast<float>(x); }
inline float exp2_approx(float x) {
  const float r = exp2f(x);
  return r < 1.1754943508222875e-38f ? 0.0f : r;
}
inline float rcp_approx(float x) { return 1.0f / x; }

}  // namespace kvquant
