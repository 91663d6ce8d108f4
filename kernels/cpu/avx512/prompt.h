// Exact attention of a prompt's tokens in BF16: what the model's own attention computes before keys
// and values are quantized. torch's kernel does not use AVX-512 BF16 on every processor.
//
//   pack         keys and values of a kv head, by tiles of 64 columns, so that a vector holds two
//                inputs (channels, or columns) of sixteen outputs (columns, or channels)
//   work item    (kv head, block of tokens), all query heads of the kv head: up to kRows rows
//     tile       64 columns: scores of all rows, softmax, weights as BF16, then sums of values
//
// Both products are `multiply`: 6 rows by 4 vectors of sums stay in registers. Tiles that causal
// order or the window hides from a whole block are not computed. A result depends on the row alone.
#pragma once

#include <atomic>
#include <cstring>

#include "cpu/decode_attention.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kStep = 6;   // rows that are multiplied at once
constexpr int kRows = 96;  // rows of a work item, at most; a multiple of kStep

// sums[r] (+)= a[r] . b for kStep rows of `pairs` BF16 pairs. b `[pairs, b_stride]` has a vector of
// sixteen outputs at each place.
template <int kVecs>
void multiply(const int32_t* a, int a_stride, const __m512i* b, int b_stride, int pairs, bool add,
              float* sums, int sums_stride) {
  __m512 sum[kStep][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kStep; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      sum[r][i] = add ? _mm512_loadu_ps(sums + r * sums_stride + 16 * i) : _mm512_setzero_ps();
    }
  }
  for (int k = 0; k < pairs; ++k, b += b_stride) {
    __m512i outputs[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) outputs[i] = _mm512_load_si512(b + i);
#pragma GCC unroll 6
    for (int r = 0; r < kStep; ++r) {
      const __m512i x = _mm512_set1_epi32(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum[r][i]) : "v"(outputs[i]), "v"(x));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kStep; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) _mm512_storeu_ps(sums + r * sums_stride + 16 * i, sum[r][i]);
  }
}

// `multiply` for any number of vectors of outputs.
inline void multiply_all(const int32_t* a, int a_stride, const __m512i* b, int vecs, int pairs,
                         bool add, float* sums, int sums_stride) {
  int i = 0;
  for (; i + 4 <= vecs; i += 4)
    multiply<4>(a, a_stride, b + i, vecs, pairs, add, sums + 16 * i, sums_stride);
  for (; i < vecs; ++i)
    multiply<1>(a, a_stride, b + i, vecs, pairs, add, sums + 16 * i, sums_stride);
}

struct PromptAttention {
  const KvquantPrompt& a;
  const int64_t q_per_kv, tiles, block, blocks;  // tokens of a work item; work items of a kv head
  const int pairs, vecs;                         // of channels
  uint8_t* packed;  // `[num_kv_heads, tiles, 2, tile_bytes]`: keys, values
  std::atomic<bool> no_memory{false};

  explicit PromptAttention(const KvquantPrompt& a)
      : a(a),
        q_per_kv(a.num_heads / a.num_kv_heads),
        tiles((a.kv_len + kTile - 1) / kTile),
        block(q_per_kv < kRows ? kRows / q_per_kv : 1),
        blocks((a.n + block - 1) / block),
        pairs(int(a.head_dim) / 2),
        vecs(int(a.head_dim) / 16) {}

  size_t tile_bytes() const { return size_t(kTile) * a.head_dim * sizeof(BFloat16); }
  int32_t* tile(int64_t h, int64_t t, int side) const {
    return reinterpret_cast<int32_t*>(packed + ((h * tiles + t) * 2 + side) * tile_bytes());
  }

  bool run() {
    packed = static_cast<uint8_t*>(
        scratch(kCallScratch, size_t(a.num_kv_heads) * tiles * 2 * tile_bytes()));
    if (packed == nullptr) return false;
    auto pack = [this](int64_t i) {
      pack_keys(i / tiles, i % tiles);
      pack_values(i / tiles, i % tiles);
    };
    parallel_for(a.num_kv_heads * tiles, a.threads, pack);
    // The last tokens see most columns, so they come first.
    auto item = [this](int64_t i) { attend(i % a.num_kv_heads, blocks - 1 - i / a.num_kv_heads); };
    parallel_for(a.num_kv_heads * blocks, a.threads, item);
    return !no_memory;
  }

  // Column t of a head's keys or values; zeros past the last.
  const uint16_t* column(const uint8_t* states, const int64_t* stride, int64_t h, int64_t t) const {
    static const uint16_t zeros[kMaxHeadDim] = {};
    return t < a.kv_len ? (const uint16_t*)(states + h * stride[0] + t * stride[1]) : zeros;
  }

  // `[pairs of channels, 64 columns, 2]`
  void pack_keys(int64_t h, int64_t t) const {
    int32_t* to = tile(h, t, 0);
    for (int i = 0; i < kTile; ++i) {
      const uint16_t* x = column(a.key, a.key_stride, h, t * kTile + i);
      for (int k = 0; k < pairs; ++k) std::memcpy(to + k * kTile + i, x + 2 * k, 4);
    }
  }

  // `[pairs of columns, head_dim, 2]`
  void pack_values(int64_t h, int64_t t) const {
    int32_t* to = tile(h, t, 1);
    for (int i = 0; i < kTile; i += 2, to += a.head_dim) {
      const uint16_t* x = column(a.value, a.value_stride, h, t * kTile + i);
      const uint16_t* y = column(a.value, a.value_stride, h, t * kTile + i + 1);
      for (int c = 0; c < a.head_dim; ++c) to[c] = int32_t(x[c] | uint32_t(y[c]) << 16);
    }
  }

  void attend(int64_t h, int64_t number) {
    const int64_t first_token = number * block, past = a.kv_len - a.n;
    const int tokens = int(a.n - first_token < block ? a.n - first_token : block);
    const int dim = int(a.head_dim);
    // Query heads beyond kRows, if there are so many, take turns.
    for (int64_t g0 = 0; g0 < q_per_kv; g0 += kRows) {
      const int heads = int(q_per_kv - g0 < kRows ? q_per_kv - g0 : kRows);
      const int rows = heads * tokens, padded = (rows + kStep - 1) / kStep * kStep;
      auto* memory = static_cast<uint8_t*>(
          scratch(kTaskScratch, padded * (size_t(dim) * 6 + kTile * 2 + sizeof(RunningSoftmax)) +
                                    kStep * kTile * sizeof(float)));
      if (memory == nullptr) {
        no_memory = true;
        return;
      }
      auto* softmax = reinterpret_cast<RunningSoftmax*>(memory);
      auto* sums = reinterpret_cast<float*>(softmax + padded);       // [padded, dim]
      auto* scores = sums + size_t(padded) * dim;                    // [kStep, kTile]
      auto* q = reinterpret_cast<int32_t*>(scores + kStep * kTile);  // [padded, pairs]
      auto* weights = q + size_t(padded) * pairs;                    // [padded, kTile / 2]
      std::memset(sums, 0, sizeof(float) * padded * dim);
      for (int r = 0; r < padded; ++r) {
        // The rows of padding repeat the last one.
        const int row = r < rows ? r : rows - 1;
        softmax[r] = RunningSoftmax();
        std::memcpy(q + r * pairs,
                    a.query + (h * q_per_kv + g0 + row / tokens) * a.query_stride[0] +
                        (first_token + row % tokens) * a.query_stride[1],
                    4 * pairs);
      }

      const int64_t begin = a.window ? past + first_token + 1 - a.window : 0;
      const int64_t end = past + first_token + tokens;
      for (int64_t t = begin > 0 ? begin / kTile : 0; t * kTile < end; ++t) {
        const int64_t first = t * kTile;
        const auto* keys = reinterpret_cast<const __m512i*>(tile(h, t, 0));
        const auto* values = reinterpret_cast<const __m512i*>(tile(h, t, 1));
        for (int r0 = 0; r0 < padded; r0 += kStep) {
          multiply<4>(q + r0 * pairs, pairs, keys, 4, pairs, false, scores, kTile);
          for (int r = r0; r < r0 + kStep; ++r) {
            const int64_t position = past + first_token + (r < rows ? r : rows - 1) % tokens;
            uint64_t visible = lowest_bits(position + 1 - first);
            if (a.window) visible &= bits_from(position + 1 - a.window, first);
            float* x = scores + (r - r0) * kTile;
            const float factor =
                softmax[r].update<float>(x, visible, nullptr, float(a.scaling), /*softcap=*/0.0f);
            if (factor != 1.0f) scale_row(sums + r * dim, dim, factor);
            for (int i = 0; i < kTile; i += 32) {
              const __m512i both =
                  (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
              _mm512_storeu_si512(weights + (r * kTile + i) / 2, both);
            }
          }
        }
        for (int r0 = 0; r0 < padded; r0 += kStep) {
          multiply_all(weights + r0 * kTile / 2, kTile / 2, values, vecs, kTile / 2, true,
                       sums + r0 * dim, dim);
        }
      }

      for (int r = 0; r < rows; ++r) {
        const int64_t head = h * q_per_kv + g0 + r / tokens, token = first_token + r % tokens;
        auto* out = reinterpret_cast<BFloat16*>(a.output) + (token * a.num_heads + head) * dim;
        const Vec norm(softmax[r].finished().finish());
        for (int c = 0; c < dim; c += Vec::kWidth) {
          (Vec::load(sums + r * dim + c) * norm).store(out + c);
        }
      }
    }
  }
};

inline bool prompt_attention(const KvquantPrompt& a) { return PromptAttention(a).run(); }

}  // namespace KVQUANT_ISA
}  // namespace kvquant
