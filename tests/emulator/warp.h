// The warp collectives, on the operands of all 32 lanes. Lane = 4 * g + t; the layouts of the
// fragments are those of the PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix"
// (https://docs.nvidia.com/cuda/parallel-thread-execution).
#pragma once

#include "machine.h"

namespace kvquant::emulator {

uint32_t shuffle(const char* name, uint32_t x, int from_lane, Site site);
uint32_t ballot(const char* name, bool x, Site site);
// Loads four tiles.
void ldmatrix(uint32_t* tiles, bool transposed, uint32_t row_address, Site site);
// Multiplies FP16 or BF16 elements.
void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool bfloat16, Site site);
// Multiplies TF32 elements; a fault if the bits that they do not have are set.
void mma_m16n8k8_tf32(float* c, const uint32_t* a, const uint32_t* b, Site site);

}  // namespace kvquant::emulator
