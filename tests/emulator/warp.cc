#include "warp.h"

#include <string.h>

#include "numbers.h"

namespace kvquant::emulator {
namespace {

struct Shuffle {
  uint32_t x;
  int from_lane;
  uint32_t result;
};
void perform_shuffle(void* const operands[32], Site site) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* to = static_cast<Shuffle*>(operands[lane]);
    if (to->from_lane < 0 || to->from_lane >= 32) {
      fault(site, "lane %d shuffles from lane %d", lane, to->from_lane);
    }
    to->result = static_cast<Shuffle*>(operands[to->from_lane])->x;
  }
}

struct Ballot {
  bool x;
  uint32_t result;
};
void perform_ballot(void* const operands[32], Site) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    result |= uint32_t(static_cast<Ballot*>(operands[lane])->x) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) static_cast<Ballot*>(operands[lane])->result = result;
}

struct LoadMatrix {
  uint32_t row[4];  // the 16 bytes that this lane's address names
  uint32_t* tiles;
  bool transposed;
};
void perform_ldmatrix(void* const operands[32], Site) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* to = static_cast<LoadMatrix*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int tile = 0; tile < 4; ++tile) {
      auto number = [&](int row, int column) {
        const uint32_t* words = static_cast<LoadMatrix*>(operands[8 * tile + row])->row;
        return words[column / 2] >> column % 2 * 16 & 0xffffu;
      };
      to->tiles[tile] = to->transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16
                                       : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
    }
  }
}

struct Multiply {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  bool bfloat16;
};

// Words i of a hold rows g + 8 (i % 2), columns 2t + 8 (i / 2) ..; words i of b rows 2t + 8 i ..,
// column g. Products are exact and the sum is rounded once; hardware rounds in an order of its own.
void perform_mma(void* const operands[32], Site) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<Multiply*>(operands[lane]);
    const auto element = [&](uint32_t word, int j) {
      const auto bits = uint16_t(word >> 16 * j);
      return from->bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
    };
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = element(from->a[i], j);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + j][g] = element(from->b[i], j);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* to = static_cast<Multiply*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = to->c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      to->c[i] = float(sum);
    }
  }
}

struct MultiplyTf32 {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// Words i of a: row g + 8 (i % 2), column t + 4 (i / 2); words i of b: row t + 4 i, column g.
void perform_mma_tf32(void* const operands[32], Site site) {
  double a[16][8], b[8][8];
  const auto element = [&](uint32_t bits) {
    if (bits & 0x1fffu) fault(site, "mma_m16n8k8_tf32 of 0x%08x, which is no TF32 number", bits);
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<MultiplyTf32*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = element(from->a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = element(from->b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* to = static_cast<MultiplyTf32*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = to->c[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      to->c[i] = float(sum);
    }
  }
}

}  // namespace

uint32_t shuffle(const char* name, uint32_t x, int from_lane, Site site) {
  Shuffle operand = {x, from_lane, 0};
  collective(name, &operand, perform_shuffle, site);
  return operand.result;
}

uint32_t ballot(const char* name, bool x, Site site) {
  Ballot operand = {x, 0};
  collective(name, &operand, perform_ballot, site);
  return operand.result;
}

void ldmatrix(uint32_t* tiles, bool transposed, uint32_t row_address, Site site) {
  LoadMatrix operand = {{}, tiles, transposed};
  shared_read(row_address, operand.row, 16, site);
  collective(transposed ? "ldmatrix_trans" : "ldmatrix", &operand, perform_ldmatrix, site);
}

void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool bfloat16, Site site) {
  Multiply operand = {c, a, b, bfloat16};
  collective("mma_m16n8k16", &operand, perform_mma, site);
}

void mma_m16n8k8_tf32(float* c, const uint32_t* a, const uint32_t* b, Site site) {
  MultiplyTf32 operand = {c, a, b};
  collective("mma_m16n8k8_tf32", &operand, perform_mma_tf32, site);
}

}  // namespace kvquant::emulator
