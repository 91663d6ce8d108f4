// All that the kernels use of the GPU: the only file with inline PTX and CUDA's built-ins.
//
// A kernel that includes this file compiles for the GPU (nvcc or NVRTC), and with
// -DKVQUANT_EMULATOR for the host, where tests/emulator/emulator.h gives every name below a second
// body that also finds faults that hardware would not. For that, kernels follow these rules:
//
//   entry     KVQUANT_KERNEL(name, threads, blocks_per_sm, dynamic shared bytes,
//                            KVQUANT_ARGUMENT Struct a, ..) { .. }
//             The compiled code holds how to launch it: int name_launch[2] = {threads, bytes}.
//   shared    KVQUANT_SHARED(type, name, n) or KVQUANT_DYNAMIC_SHARED(type, name), passed on as
//             SharedPtr<type>; read into a variable with its type written (`float x = p[i];`),
//             assigned as a whole (`p[i] = x;`), seen as another type by shared_cast<U>(p)
//   global    never through a raw `*p`: global_load, load_16, cp_async, global_store, store_16
//   warps     collectives are called by all 32 lanes from the same line; blocks are whole warps
//   grids     every thread calls wait_for_grids() before it touches global memory, or ends
//
// Packed pairs of 16-bit elements are uint32_t, the first in the low half.
#pragma once

#include "kvquant/params.h"

#ifndef KVQUANT_THREADS
#define KVQUANT_THREADS 128
#endif

#ifdef KVQUANT_EMULATOR
#include "emulator.h"
#else

#ifdef __CUDA_ARCH__
#define KVQUANT_ARCH __CUDA_ARCH__
#else
#define KVQUANT_ARCH 0
#endif

#define KVQUANT_DEVICE __device__ __forceinline__
#define KVQUANT_ARGUMENT const __grid_constant__
#define KVQUANT_KERNEL(name, threads, blocks_per_sm, shared_bytes, ...) \
  extern "C" {                                                          \
  __constant__ int name##_launch[2] = {threads, shared_bytes};          \
  }                                                                     \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(__VA_ARGS__)
#define KVQUANT_SHARED(type, name, n) __shared__ __align__(16) type name[n]
#define KVQUANT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char kvquant_dynamic_shared[]; \
  kvquant::SharedPtr<type> name = reinterpret_cast<kvquant::SharedPtr<type>>(kvquant_dynamic_shared)

namespace kvquant {

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

template <class T>
using SharedPtr = T*;
template <class U, class T>
KVQUANT_DEVICE SharedPtr<U> shared_cast(T* p) {
  return reinterpret_cast<U*>(p);
}
KVQUANT_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// -- where a thread stands, and barriers --------------------------------------------------------

KVQUANT_DEVICE int thread_index() { return threadIdx.x; }
KVQUANT_DEVICE int lane_index() { return threadIdx.x % 32; }
KVQUANT_DEVICE int warp_index() { return threadIdx.x / 32; }
KVQUANT_DEVICE int block_index_x() { return blockIdx.x; }
KVQUANT_DEVICE int block_index_y() { return blockIdx.y; }
KVQUANT_DEVICE int block_index_z() { return blockIdx.z; }
KVQUANT_DEVICE int grid_size_x() { return gridDim.x; }
KVQUANT_DEVICE int grid_size_y() { return gridDim.y; }
KVQUANT_DEVICE int grid_size_z() { return gridDim.z; }
KVQUANT_DEVICE void block_barrier() { __syncthreads(); }
KVQUANT_DEVICE void warp_barrier() { __syncwarp(); }  // orders shared memory within the warp

// -- kernels of a stream, one after the other ----------------------------------------------------
// From sm_90 on, a kernel may start while the one before it runs (gpu.py asks for that), which hides
// the time of a launch. Elsewhere both calls do nothing.
//
//     quantize_append    |----------------|
//     decode_attention     start ~ ~ ~ ~ ~ |-----------------------|         ~  waits
//     merge_splits                           start ~ ~ ~ ~ ~ ~ ~ ~ ~ |-----|
//
// Whoever wrote a byte has ended before it is read, even two kernels earlier, because no kernel ends
// before the one ahead of it.

// Returns when the kernel ahead has ended, and what it wrote can be read.
KVQUANT_DEVICE void wait_for_grids() {
#if KVQUANT_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start as soon as all blocks have called this.
KVQUANT_DEVICE void let_next_grid_start() {
#if KVQUANT_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// -- votes and shuffles: no order of memory ------------------------------------------------------

KVQUANT_DEVICE uint32_t warp_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
KVQUANT_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
// T: float, int32_t or uint32_t.
template <class T>
KVQUANT_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
KVQUANT_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// -- global memory -------------------------------------------------------------------------------

// T: 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <class T>
KVQUANT_DEVICE T global_load(const T* p) {
  return *p;
}
template <class T>
KVQUANT_DEVICE void global_store(T* p, T x) {
  *p = x;
}
// For integers that another block of the same launch may write or read: no order, but no tearing.
KVQUANT_DEVICE int32_t global_load_relaxed(const int32_t* p) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
KVQUANT_DEVICE int64_t global_load_relaxed(const int64_t* p) {
  int64_t x;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
KVQUANT_DEVICE void global_store_relaxed(int32_t* p, int32_t x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
KVQUANT_DEVICE void global_store_relaxed(int64_t* p, int64_t x) {
  asm volatile("st.relaxed.gpu.global.s64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
KVQUANT_DEVICE void atomic_add(int64_t* p, int64_t x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
// Adds, and returns the sum before. What a block has read before is read before another block's
// call returns a larger sum.
KVQUANT_DEVICE int64_t atomic_add_in_order(int64_t* p, int64_t x) {
  int64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(p), "l"(x)
               : "memory");
  return before;
}

KVQUANT_DEVICE Words4 load_16(const void* p) { return *static_cast<const Words4*>(p); }
// For bytes that no thread writes during the launch, and that this block reads once.
KVQUANT_DEVICE Words4 load_16_once(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
KVQUANT_DEVICE void store_16(void* p, Words4 x) { *static_cast<Words4*>(p) = x; }

// -- asynchronous copies, global to shared --------------------------------------------------------
// A copy is in flight until its thread has committed it to a group and waited for the group; what
// other threads copied is visible after a barrier that follows their wait.

KVQUANT_DEVICE void cp_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(from)
               : "memory");
}
// 16 zeros, and no access to `from`, unless `valid`.
KVQUANT_DEVICE void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
KVQUANT_DEVICE void cp_async_8(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}
KVQUANT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are in flight.
template <int N>
KVQUANT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// -- matrices; lane = 4 * g + t ------------------------------------------------------------------

// Loads 8x8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8, which is
// aligned to its 16 bytes. r[j] of tile j: row g, columns 2t and 2t + 1; .._trans: rows 2t and
// 2t + 1 of column g.
KVQUANT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
KVQUANT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements: a lane gives row g, columns 2t and 2t + 1, and
// gets the same of the result.
KVQUANT_DEVICE uint32_t transpose_8x8(uint32_t x) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

// c += a b, a `[16, 16]`, b `[16, 8]`, c `[16, 8]` in FP32:
//   a[i]  row g + 8 (i % 2), columns 2t + 8 (i / 2) + {0, 1}
//   b[i]  rows 2t + 8 i + {0, 1}, column g
//   c[i]  row g + 8 (i / 2), column 2t + i % 2
KVQUANT_DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KVQUANT_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b, a `[16, 8]`, b `[8, 8]`, c `[16, 8]` in FP32. Elements of a and b are TF32: floats whose
// lowest 13 bits are 0.
//   a[i]  row g + 8 (i % 2), column t + 4 (i / 2)
//   b[i]  row t + 4 i, column g
//   c[i]  row g + 8 (i / 2), column 2t + i % 2
KVQUANT_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// -- words ---------------------------------------------------------------------------------------

// Any function of three bits; kTable is its result for a = 0xf0, b = 0xcc, c = 0xaa.
template <int kTable>
KVQUANT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return r;
}
// Four of the eight bytes of (a, b), a's first: nibble i of the selector is the index of byte i's
// source; with 8 added, byte i is the source's sign bit, eight times.
KVQUANT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

KVQUANT_DEVICE int count_bits(uint32_t x) { return __popc(x); }

// -- pairs of FP16 and BF16 elements, one rounding each, subnormals kept --------------------------

KVQUANT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
KVQUANT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
KVQUANT_DEVICE uint32_t hsub2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

KVQUANT_DEVICE uint32_t pack_half2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
KVQUANT_DEVICE uint32_t pack_bfloat162(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
KVQUANT_DEVICE float half_low(uint32_t x) {
  float r;
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(r) : "r"(x));
  return r;
}
KVQUANT_DEVICE float half_high(uint32_t x) {
  float r;
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(r) : "r"(x));
  return r;
}
KVQUANT_DEVICE float bfloat16_low(uint32_t x) { return __uint_as_float(x << 16); }
KVQUANT_DEVICE float bfloat16_high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

#if KVQUANT_ARCH >= 890
// Two floats of magnitude at most 448 as e4m3 bytes, in the low half.
KVQUANT_DEVICE uint32_t pack_e4m3x2(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// The FP16 values of the two e4m3 bytes in the low half, or in the high half.
KVQUANT_DEVICE uint32_t e4m3x2_low(uint32_t x) {
  uint32_t r;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l; }" : "=r"(r) : "r"(x));
  return r;
}
KVQUANT_DEVICE uint32_t e4m3x2_high(uint32_t x) {
  uint32_t r;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(r) : "r"(x));
  return r;
}
#endif

// -- float: one IEEE rounding each, never contracted; approximations say so -----------------------

KVQUANT_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
KVQUANT_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
KVQUANT_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
KVQUANT_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KVQUANT_DEVICE float rcp_rn(float x) { return __frcp_rn(x); }
KVQUANT_DEVICE float max_nan(float a, float b) {  // NaN if one of them is; fmaxf takes the other
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
KVQUANT_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
KVQUANT_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
KVQUANT_DEVICE float exp2_approx(float x) {  // 2 ulp; subnormal results are 0
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KVQUANT_DEVICE float rcp_approx(float x) {  // 1 ulp
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace kvquant
#endif  // KVQUANT_EMULATOR
