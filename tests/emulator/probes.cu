// Small kernels for tests/test_emulator.py: what each primitive means, and one planted fault of
// each kind.
#include "cuda/primitives.h"

using namespace kvquant;

struct Probe {
  const uint8_t* input;
  uint8_t* output;
  int64_t variant;  // 0: correct; else the planted fault, or see the kernel
};

// c `[16, 8]` = a `[16, 16]` b `[16, 8]`, row-major; variant: bit 0 BF16, bit 1 without ldmatrix,
// element by element as the PTX ISA gives rows and columns, bit 2 b is stored transposed.
KVQUANT_KERNEL(mma_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES, KVQUANT_ARGUMENT Probe p) {
  KVQUANT_SHARED(uint16_t, tile_a, 16 * 16);
  KVQUANT_SHARED(uint16_t, tile_b, 16 * 8);
  const int lane = lane_index(), group = lane >> 2, in_group = lane % 4;
  const bool b_transposed = p.variant & 4;
  const uint16_t* input = reinterpret_cast<const uint16_t*>(p.input);
  for (int i = lane; i < 16 * 16; i += 32) tile_a[i] = global_load(input + i);
  for (int i = lane; i < 16 * 8; i += 32) tile_b[i] = global_load(input + 256 + i);
  warp_barrier();
  uint32_t a[4], b[2];
  float c[4] = {};
  if (p.variant & 2) {
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      const uint16_t x = tile_a[16 * row + column];
      a[i / 2] = i & 1 ? a[i / 2] | uint32_t(x) << 16 : x;
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), column = group;
      const uint16_t x = tile_b[b_transposed ? 16 * column + row : 8 * row + column];
      b[i / 2] = i & 1 ? b[i / 2] | uint32_t(x) << 16 : x;
    }
  } else {
    ldmatrix_x4(a, tile_a + 16 * (lane % 16) + lane / 16 * 8);
    uint32_t twice[4];  // b has two tiles
    if (b_transposed) {
      ldmatrix_x4(twice, tile_b + 16 * (lane % 8) + lane / 8 % 2 * 8);
    } else {
      ldmatrix_x4_trans(twice, tile_b + 8 * (lane % 16));
    }
    b[0] = twice[0], b[1] = twice[1];
  }
  if (p.variant & 1) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
  float* output = reinterpret_cast<float*>(p.output);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    global_store(output + 8 * row + column, c[i]);
  }
}

// The x4 forms on four 8x8 tiles stored one after the other; r[j] of every lane; variant 1: .trans.
KVQUANT_KERNEL(ldmatrix_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES,
               KVQUANT_ARGUMENT Probe p) {
  KVQUANT_DYNAMIC_SHARED(uint16_t, tiles);
  const int lane = lane_index();
  cp_async_16(tiles + 8 * lane, p.input + 16 * lane);
  cp_async_commit();
  cp_async_wait<0>();
  warp_barrier();
  uint32_t r[4];
  if (p.variant) {
    ldmatrix_x4_trans(r, tiles + 8 * lane);
  } else {
    ldmatrix_x4(r, tiles + 8 * lane);
  }
  store_16(p.output + 16 * lane, {r[0], r[1], r[2], r[3]});
}

// Reads three words per thread, and writes 16 functions of them.
KVQUANT_KERNEL(words_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES, KVQUANT_ARGUMENT Probe p) {
  const int i = block_index_x() * KVQUANT_THREADS + thread_index();
  const uint32_t* input = reinterpret_cast<const uint32_t*>(p.input) + 3 * i;
  const uint32_t a = global_load(input), b = global_load(input + 1), c = global_load(input + 2);
  const uint32_t results[] = {
      lop3<0xea>(a, b, c),
      lop3<0x6a>(a, b, c),
      lop3<0xd8>(a, b, c),
      prmt(a, b, c),
      hfma2(a, b, c),
      hmul2(a, b),
      hsub2(a, b),
      float_bits(half_low(a)),
      float_bits(half_high(a)),
      float_bits(bfloat16_low(a)),
      float_bits(bfloat16_high(a)),
      pack_half2(bits_float(b), bits_float(c)),
      pack_bfloat162(bits_float(b), bits_float(c)),
#if KVQUANT_ARCH >= 890
      pack_e4m3x2(bits_float(b), bits_float(c)),
#else
      0,
#endif
      float_bits(rcp_rn(bits_float(a))),
      float_bits(exp2_approx(bits_float(a))),
  };
  uint32_t* output = reinterpret_cast<uint32_t*>(p.output) + 16 * i;
  for (int j = 0; j < 16; ++j) global_store(output + j, results[j]);
}

// Per lane: shuffles from lane (7 i) % 32 and from lane i ^ 5, the votes on i % 3 == 0, and a
// transposed matrix whose rows are 2 i and 2 i + 1.
KVQUANT_KERNEL(shuffle_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES, KVQUANT_ARGUMENT Probe p) {
  const int i = thread_index(), lane = lane_index();
  int32_t* output = reinterpret_cast<int32_t*>(p.output) + 5 * i;
  global_store(output, shuffle(i, 7 * lane % 32));
  global_store(output + 1, int32_t(shuffle_xor(float(i), 5)));
  global_store(output + 2, int32_t(warp_ballot(lane % 3 == 0)));
  global_store(output + 3, int32_t(warp_any(i == 40)));
  global_store(output + 4, int32_t(transpose_8x8(uint32_t(2 * i | (2 * i + 1) << 16))));
}

// Sums tiles of 16 bytes per thread through three stages; each thread adds what its neighbour (in
// the next warp) copied. The planted faults are those of a pipeline.
KVQUANT_KERNEL(pipeline_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES,
               KVQUANT_ARGUMENT Probe p) {
  enum { kNoWait = 1, kNoCommit, kOneTooMany, kNoBarrierAfterWait, kNoBarrierBeforeRefill, kLeft };
  constexpr int kStages = 3, kTiles = 7;
  KVQUANT_DYNAMIC_SHARED(uint8_t, stages);
  const int i = thread_index(), neighbour = (i + 32) % KVQUANT_THREADS;
  const int tile_bytes = 16 * KVQUANT_THREADS;
  auto fetch = [&](int tile) {
    const bool exists = tile < kTiles || (p.variant == kLeft && tile == kTiles);
    if (exists) {
      cp_async_16(stages + tile % kStages * tile_bytes + 16 * i,
                  p.input + tile % kTiles * tile_bytes + 16 * i, tile != kTiles - 1 || i < 50);
    }
    if (p.variant != kNoCommit) cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  uint32_t sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (p.variant == kOneTooMany) {
      cp_async_wait<kStages - 1>();
    } else if (p.variant != kNoWait) {
      cp_async_wait<kStages - 2>();
    }
    if (p.variant != kNoBarrierAfterWait) block_barrier();
    const SharedPtr<Words4> stage = shared_cast<Words4>(stages + tile % kStages * tile_bytes);
    const Words4 words = stage[neighbour];
    sum += words.x + words.y + words.z + words.w;
    if (p.variant == kNoBarrierBeforeRefill) {
      fetch(tile + kStages);  // the stage that others may still read
    } else {
      fetch(tile + kStages - 1);
    }
  }
  global_store(reinterpret_cast<uint32_t*>(p.output) + i, sum);
}

// In two blocks, every thread passes a value to thread i ^ 33, in another warp, and one to its
// neighbour in the warp. The planted faults are all other kinds.
KVQUANT_KERNEL(exchange_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES,
               KVQUANT_ARGUMENT Probe p) {
  enum {
    kNoBarrier = 1,
    kWarpBarrierOnly,
    kNoWarpBarrier,
    kTwoWriters,
    kUnwritten,
    kPartlyUnwritten,
    kSharedBeyond,
    kDynamicBeyond,
    kSharedMisaligned,
    kReadBeyond,
    kReadBefore,
    kReadNull,
    kWriteReadOnly,
    kMisaligned16,
    kBlocksWrite,
    kThreadsWrite,
    kBlockReads,
    kExitBeforeBarrier,
    kOtherBarrier,
    kBarrierInBranch,
    kHalfWarpShuffles,
    kShuffleAfterExit,
    kOtherCollective,
    kLaneOutOfRange,
    kWriteAfterRead,
    kWriteAfterOthersRead,
    kRelaxedAndPlain,
    kBlockReadBefore,
    kNoBarrierInGlobal
  };
  KVQUANT_SHARED(int32_t, across, KVQUANT_THREADS);
  KVQUANT_SHARED(int32_t, beside, KVQUANT_THREADS);
  KVQUANT_DYNAMIC_SHARED(int32_t, dynamic);
  const int i = thread_index(), n = KVQUANT_THREADS, block = block_index_x();
  const int32_t* input = reinterpret_cast<const int32_t*>(p.input);
  int32_t* output = reinterpret_cast<int32_t*>(p.output);
  const int variant = int(p.variant);

  beside[i] = 1000 * i;
  if (variant != kNoWarpBarrier) warp_barrier();
  int32_t sum = beside[i ^ 1];
  if (variant == kWriteAfterRead && i == 6) beside[4] = 0;

  if (variant != kUnwritten || i != 70) {
    across[i] = global_load(input + i);
  }
  if (variant == kPartlyUnwritten && i < 32) {
    shared_cast<uint8_t>(dynamic)[4 * i + 1] = 0;
    warp_barrier();
    sum += int32_t(dynamic[i]);
  }
  if (variant == kTwoWriters && i == 9) across[8] = 1;
  if (variant == kSharedBeyond && i == 5) across[n] = 1;
  if (variant == kDynamicBeyond && i == 5) dynamic[n] = 1;
  if (variant == kSharedMisaligned && i == 0)
    shared_cast<int32_t>(shared_cast<uint8_t>(dynamic) + 2)[0] = 1;
  if (variant == kReadBeyond && i == 3) sum += global_load(input + n);
  if (variant == kReadBefore && i == 3) sum += global_load(input - 1);
  if (variant == kReadNull && i == 3) sum += global_load(static_cast<const int32_t*>(nullptr));
  if (variant == kWriteReadOnly) global_store(const_cast<int32_t*>(input) + i, 1);
  if (variant == kMisaligned16) sum += int32_t(load_16(p.input + 4 * i).x);
  if (variant == kBlocksWrite) global_store(output + i, 1);
  if (variant == kThreadsWrite) global_store(output + n * block, 1);
  if (variant == kBlockReads && block == 1) sum += global_load(output + i);
  if (variant == kRelaxedAndPlain) {
    if (block == 0) global_store_relaxed(output + i, 1);
    if (block == 1) sum += global_load(output + i);
  }
  if (variant == kBlockReadBefore && block == 0) sum += global_load(output + n + i);
  if (variant == kExitBeforeBarrier && i == 77) return;
  if (variant == kOtherBarrier && i >= 64) block_barrier();

  if (variant == kWarpBarrierOnly) {
    warp_barrier();
  } else if (variant == kBarrierInBranch) {
    if (i % 32 == 4) shuffle_xor(i, 1);
    block_barrier();
  } else if (variant != kNoBarrier) {
    block_barrier();
  }
  sum += across[i ^ 33];
  if (variant == kWriteAfterOthersRead && i == 100) across[32] = 0;

  if (variant == kHalfWarpShuffles) {
    if (i % 32 < 16) shuffle_xor(i, 1);
    return;
  }
  if (variant == kShuffleAfterExit) {
    if (i != 40) shuffle_xor(i, 1);
    return;
  }
  if (variant == kOtherCollective) {
    if (i % 2) {
      sum += shuffle_xor(i, 1);
    } else {
      sum += warp_any(i == 0);
    }
  }
  if (variant == kLaneOutOfRange) sum += shuffle(i, i % 32 + 1);
  // Global memory is ordered by the block's barriers, too.
  global_store(output + n * block + i, i);
  if (variant != kNoBarrierInGlobal) block_barrier();
  sum += global_load(output + n * block + (i ^ 64));
  block_barrier();
  global_store(output + n * block + i, sum);
}

// Starts before the kernel ahead has ended; thread i copies element i. Variants: WAITS in
// test_emulator.py.
KVQUANT_KERNEL(early_kernel, KVQUANT_THREADS, 1, KVQUANT_SHARED_BYTES, KVQUANT_ARGUMENT Probe p) {
  enum { kLoadsBefore = 1, kStoresBefore, kEndsBefore };
  const int i = thread_index(), variant = int(p.variant);
  const int32_t* input = reinterpret_cast<const int32_t*>(p.input) + i;
  int32_t* output = reinterpret_cast<int32_t*>(p.output) + i;
  let_next_grid_start();
  if (variant == kLoadsBefore) global_load(input);
  if (variant == kStoresBefore && i == 5) global_store(output, 0);
  if (variant == kEndsBefore && i == 5) return;
  wait_for_grids();
  global_store(output, global_load(input));
}
