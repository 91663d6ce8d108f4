// Scores of a tile of columns in dot products; methods.h draws the loops.
#pragma once

#include "cpu/folding.h"
#include "dot.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// How stored keys become operands: `expand` turns one vector of bytes into kOut vectors of unsigned
// codes. The elements' dot product follows from that of the codes:
//   (kTimes * dot product of codes - offset * sum of weights) / kTimes
// The offset, if kHasOffset, is 128 for codes of 8 bits, which are signed, and twice the midpoint
// for nibbles.
template <class Format, bool kCentered, int kBytes>
struct KeyOperand {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 1, kTimes = 1;
  static constexpr bool kHasOffset = kCentered;
  void expand(Quads x, Quads* out) const { out[0] = kCentered ? x ^ Quads(128) : x; }
};
template <bool kCentered, int kBytes>
struct KeyOperand<Nibble, kCentered, kBytes> {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 2, kTimes = kCentered ? 2 : 1;
  static constexpr bool kHasOffset = kCentered;
  void expand(Quads x, Quads* out) const {
    out[0] = x.low_nibbles();
    out[1] = x.high_nibbles();
  }
};
struct PairedKeys {
  using Dot = PairDot;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 1, kTimes = 2;
  static constexpr bool kHasOffset = true;
  void expand(Quads x, PairDot::Codes* out) const { out[0] = x; }
};

// Shared by the weights of one group: float = factor * weight.
struct Share {
  float factor;
  int64_t offset;  // subtracted from the dot product: at first the sum of the weights
};

// Makes the weights of n floats (a multiple of 16), in `Dot::kPlanes` planes of quads with room for
// a multiple of 64 weights.
template <class Dot, bool kSum>
inline Share make_weights(const float* x, int n, float factor, int32_t* quads, int stride) {
  const Vec inverse(Dot::inverse(factor));
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < n; c += 64) {
    Vec v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = c + 16 * i < n ? Vec::load(x + c + 16 * i) * inverse : Vec(0.0f);
    }
    sum = _mm512_add_epi32(sum, Dot::split(v, n - c, quads + Dot::quads(c), stride));
  }
  return {factor, kSum ? Dot::total(sum) : 0};
}

// An address in each of 16 columns: in column 4 l + i it is group[l] + column[i]. It takes eight
// registers; there are not enough for 16 pointers.
struct Columns16 {
  const uint8_t* group[4];
  int64_t column[4];

  Columns16(const uint8_t* p, int64_t row_bytes) {
    for (int i = 0; i < 4; ++i) {
      group[i] = p + 4 * i * row_bytes;
      column[i] = i * row_bytes;
      asm("" : "+r"(group[i]), "+r"(column[i]));
    }
  }
  void advance(int bytes) {
#pragma GCC unroll 4
    for (int64_t& c : column) {
      c += bytes;
      asm("" : "+r"(c));
    }
  }
};

template <class Operand>
struct QuadKeys {
  using Dot = typename Operand::Dot;
  static constexpr int kQuads = Dot::quads(kMaxDotDim + 64);
  // The vectors of columns and the query rows whose sums fit in the registers beside the codes.
  static constexpr int kVecs = Dot::kSums == 1 ? 2 : 1, kRowsAtOnce = Dot::kSums == 2 ? 8 : 4;

  // A query row as weights; on the channel grid it is first multiplied by the scales of a block.
  struct alignas(64) Row {
    int32_t quads[Dot::kPlanes][kQuads];
    Share share[kMaxGroups];
    float zero;  // query x zero points, which is added to every score of a block
  };

  static constexpr bool kRounds = Dot::kRounds;
  static float factor(const Largest& x, int) { return Dot::factor(x); }

  static size_t prepared_bytes(const Body& keys, int rows) {
    return keys.channel_grid ? Folding<QuadKeys>::prepared_bytes(rows) : rows * sizeof(Row);
  }

  static void prepare(const Body& keys, const float* q, int rows, void* prepared) {
    if (keys.channel_grid) return Folding<QuadKeys>::prepare(prepared);
    Row* row = static_cast<Row*>(prepared);
    const int length = int(keys.group_length);
    for (int r = 0; r < rows; ++r, ++row, q += keys.head_dim) {
      for (int g = 0; g < keys.num_scales; ++g) {
        const int quad = Dot::quads(g * length);
        Largest largest;
        for (int c = 0; c < length; c += 16) largest.take(Vec::load(q + g * length + c));
        row->share[g] = make_weights<Dot, Operand::kHasOffset>(
            q + g * length, length, Dot::factor(largest), row->quads[0] + quad, kQuads);
        row->share[g].offset *= Operand::kNibbles ? int64_t(2 * keys.midpoint) : 128;
      }
    }
  }

  static void score(const Body& keys, int64_t first, int n, uint64_t, const float* q,
                    void* prepared, int rows, float* scores) {
    uint8_t rest[kTile * kMaxDotDim];
    const uint8_t* data = whole_tile(keys, first, n, rest);
    if (keys.channel_grid) {
      const Row* row = Folding<QuadKeys>::fold(keys, first, q, rows, prepared);
      score_group(data, row_step(keys), int(keys.row_bytes), row, 0, 0, nullptr, rows, scores);
      return;
    }
    const int groups = int(keys.num_scales), group_bytes = int(keys.row_bytes) / groups;
    const int group_quads = Dot::quads(keys.head_dim / groups);
    alignas(64) float scale[kTile];
    for (int g = 0; g < groups; ++g, data += group_bytes) {
      load_scales(keys, g, first, n, scale);
      score_group(data, row_step(keys), group_bytes, static_cast<const Row*>(prepared), g,
                  g * group_quads, scale, rows, scores);
    }
  }

  // As `Folding` asks for it.
  template <int kRows>
  KVQUANT_NOINLINE static void fold(const Body& keys, int64_t block, const DividedQuery* query,
                                    Row* row) {
    const int n = keys.head_dim;
    const auto* scales = (const Half*)(keys.scale + block * n);
    const auto* zeros = (const Half*)(keys.zero_point ? keys.zero_point + block * n : nullptr);
    Vec zero[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) zero[r] = Vec(0.0f);
    const auto fold_channels = [&](int c, int vecs) KVQUANT_INLINED {
      Vec scale[4], zero_point[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        scale[i] = i < vecs ? Vec::load(scales + c + 16 * i) : Vec(0.0f);
        zero_point[i] = i < vecs && zeros ? Vec::load(zeros + c + 16 * i) : Vec(0.0f);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          x[i] = i < vecs ? Vec::load(query[r].q + c + 16 * i) : Vec(0.0f);
          zero[r] = Vec::fma(x[i], zero_point[i], zero[r]);
        }
        split_products<Dot>(x, scale, n - c, row[r].quads[0] + Dot::quads(c), kQuads);
      }
    };
    int c = 0;
    for (; c + 64 <= n; c += 64) fold_channels(c, 4);
    if (c < n) fold_channels(c, (n - c) / 16);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r].share[0] = {query[r].factor, 0};
      row[r].zero = query[r].factor * Vec::sum(zero[r]);
    }
  }

 private:
  KVQUANT_NOINLINE static void score_group(const uint8_t* columns, RowStep row_bytes, int bytes,
                                           const Row* row, int g, int quad, const float* scale,
                                           int rows, float* scores) {
    for_row_blocks<kRowsAtOnce>(rows, [&](int r, auto block) {
      score_rows<block>(columns, row_bytes, bytes, row + r, g, quad, scale, scores + r * kTile);
    });
  }

  // Scores of a tile and kRows query rows over the channels of group g: `bytes` bytes of each
  // column, from `columns` on in the first one. `quad`: the group's first quad of weights; `scale`:
  // the columns' scales, or null on the channel grid.
  template <int kRows>
  KVQUANT_NOINLINE static void score_rows(const uint8_t* columns, RowStep row_bytes, int bytes,
                                          const Row* row, int g, int quad, const float* scale,
                                          float* scores) {
    constexpr int kColumns = kVecs * Quads::kCount;
    for (int i = 0; i < kTile; i += kColumns, columns += kColumns * row_bytes) {
      Dot acc[kRows][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[r][v].clear();
      }
      Columns16 at(columns, row_bytes);
      int c = 0, from = quad;
      for (; c + 16 <= bytes; c += 16, from += 4 * Operand::kOut) {
        for (int j = 0; j < 16 * kVecs; j += 4)
          prefetch_tile(columns + (c * kVecs + j) * 16, row_bytes);
        score_piece<kRows, 4>(at, row_bytes, row, from, acc);
        at.advance(16);
      }
      if (Operand::kNibbles && c < bytes) score_piece<kRows, 2>(at, row_bytes, row, from, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Share share = row[r].share[g];
        const Vec factor(share.factor / Operand::kTimes);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          const int at = i + v * Vec::kWidth;
          float* out = scores + r * kTile + at;
          const Vec dot = acc[r][v].result(Operand::kTimes, Operand::kHasOffset, share.offset);
          const Vec s = scale ? dot * factor * Vec::load(scale + at)
                              : Vec::fma(dot, factor, Vec(row[r].zero));
          (g == 0 ? s : s + Vec::load(out)).store(out);
        }
      }
    }
  }
  template <int kRows, int kByteQuads>
  static inline void score_piece(const Columns16& at, int64_t row_bytes, const Row* row, int quad,
                                 Dot (*acc)[kVecs]) {
    const Operand operand{};
    Quads in[kVecs][4];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        in[v][i] = Quads::lanes(at.group, at.column[i] + v * 16 * row_bytes, kByteQuads == 2);
      }
      Quads::transpose_quads(in[v]);
    }
#pragma GCC unroll 4
    for (int d = 0; d < kByteQuads; ++d) {
      typename Dot::Codes codes[kVecs][Operand::kOut];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) operand.expand(in[v][d], codes[v]);
#pragma GCC unroll 2
      for (int o = 0; o < Operand::kOut; ++o) {
        // The second of two vectors holds, for nibbles, the channels after those of the first
        // and, for BF16, the other two elements of four.
        const int at = quad + (Operand::kNibbles ? o * kByteQuads + d : d * Operand::kOut + o);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          if constexpr (kVecs == 1) {
            acc[r][0].add(codes[0][o], row[r].quads[0] + at, kQuads);
          } else {
            const typename Dot::Weights weights(row[r].quads[0] + at, kQuads);
#pragma GCC unroll 2
            for (int v = 0; v < kVecs; ++v) acc[r][v].add(codes[v][o], weights);
          }
        }
      }
    }
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
