// Weighted sums over a tile of columns in dot products of stored codes, for AVX2 and NEON. The loops
// over columns, `sum_columns`, are in values.h of each instruction set.
#pragma once

#include "cpu/whole_tile.h"
#include "values.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

template <class Operand, bool kChannel>
struct DotValues {
  using Format = typename Operand::Format;
  static constexpr bool kZeroPoints = kChannel && Format::kLevels != 0.0f;
  // As in dot_keys.h.
  static constexpr bool kHasOffset =
      (!kChannel && Format::kMidpoint != 0.0f) || Operand::kBias != 0.0f;

  // The weights of one query row: probabilities, on the token grid times the scales of a group.
  struct Row {
    alignas(32) typename Operand::Weight weights[kTile];
    float factor;
    float offset;  // subtracted from every sum
    float total;   // channel grid: of the probabilities
  };

  static void accumulate(const Body& values, int64_t first, int n, const uint64_t* columns,
                         const float* p, int rows, float* acc) {
    alignas(32) uint8_t room[kTileRoom<Operand>];
    const Tile tile = tile_of(Operand{}, values, first, n, room);
    Row row[kMaxPaddedRows];
    const int groups = kChannel ? 1 : int(values.num_scales);
    const int group_bytes = int(tile.row_bytes / groups);
    const int64_t scales_at = kChannel ? first / values.group_length * values.head_dim : 0;
    for (int g = 0; g < groups; ++g) {
      alignas(32) float scale[kTile];
      if (!kChannel) load_scales(values, g, first, n, scale);
      for_row_blocks<4>(rows, [&](int r, auto block) {
        make_rows<block>(values, scale, columns + r, p + r * kTile, row + r);
      });
      for_row_blocks<4>(rows, [&](int r, auto block) {
        accumulate_group<block>(values, scales_at, tile, g * group_bytes, group_bytes, row + r,
                                acc + r * values.head_dim);
      });
    }
  }

  static void finish(const Body& values, int rows, float* acc) {
    if constexpr (kInPasses) {
      if (in_passes(values))
        for (int r = 0; r < rows; ++r)
          sort_sums(Operand{}, acc + r * values.head_dim, values.head_dim);
    }
  }

 private:
  static constexpr bool kInPasses = kPasses<Operand> == 4 && !kChannel;
  static bool in_passes(const Body& values) { return values.group_length % 64 == 0; }

  // Makes the weights of kRows rows. The rows advance together, because the steps of one row wait for
  // each other.
  template <int kRows>
  KVQUANT_NOINLINE static void make_rows(const Body& values, const float* scale,
                                         const uint64_t* columns, const float* p, Row* row) {
    constexpr int kVecs = kTile / Vec::kWidth;
    alignas(32) float w[kRows][kTile];
    Largest largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        Vec x = Vec::load(p + r * kTile + i * Vec::kWidth);
        if (!kChannel) x = x * Vec::load(scale + i * Vec::kWidth);
        // A hidden column may have no scale yet.
        if (columns[r] != kAllColumns)
          x = Vec::where(uint32_t(columns[r] >> i * Vec::kWidth), x, Vec(0.0f));
        largest[r].take(x);
        x.store(w[r] + i * Vec::kWidth);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r].factor = Operand::factor(largest[r], kTile);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      typename Operand::Maker maker;
      const Vec inverse(Operand::Maker::inverse(row[r].factor));
#pragma GCC unroll 4
      for (int i = 0; i < kTile; i += 2 * Vec::kWidth)
        maker.make(Vec::load(w[r] + i) * inverse, Vec::load(w[r] + i + Vec::kWidth) * inverse,
                   row[r].weights + i);
      const float sum = maker.sum();
      row[r].offset = kHasOffset ? (values.midpoint - Operand::kBias) * sum : 0.0f;
      row[r].total = kZeroPoints ? row[r].factor * sum : 0.0f;
    }
  }

  // Adds the weighted sums of a group, those of n bytes from `byte` on in a row, to `acc`.
  template <int kRows>
  KVQUANT_NOINLINE static void accumulate_group(const Body& values, int64_t scales_at, Tile tile,
                                                int byte, int n, const Row* row, float* acc) {
    constexpr int kBytes = Operand::kBytes;
    const int end = byte + n;
    if constexpr (kInPasses) {
      for (; in_passes(values) && byte < end; byte += 4 * kBytes) {
        accumulate_piece<kRows, 0>(values, scales_at, tile, byte, row, acc);
        accumulate_piece<kRows, 1>(values, scales_at, tile, byte + kBytes, row, acc);
        accumulate_piece<kRows, 2>(values, scales_at, tile, byte + 2 * kBytes, row, acc);
        accumulate_piece<kRows, 3>(values, scales_at, tile, byte + 3 * kBytes, row, acc);
      }
    }
    for (; byte < end; byte += kBytes)
      accumulate_piece<kRows, -1>(values, scales_at, tile, byte, row, acc);
  }

  // Adds the weighted sums of 16 channels, those of the bytes from `byte` on in a row, to `acc`.
  // Channel grid: `scales_at` is where the scales and zero points of the tile's block begin.
  // kPass: see `kPasses`; -1: in the order of channels.
  template <int kRows, int kPass>
  KVQUANT_INLINE static void accumulate_piece(const Body& values, int64_t scales_at, Tile tile,
                                              int byte, const Row* row, float* acc) {
    Vec sums[kRows][2];
    constexpr bool kSorted = kPass < 0;
    if constexpr (kSorted)
      sum_columns<kRows>(Operand{}, tile.rows + byte, tile.row_bytes, byte, row, sums);
    else
      sum_words<kRows, kPass>(Operand{}, tile.rows + byte - kPass * Operand::kBytes, tile.row_bytes,
                              row, sums);
    constexpr bool kNibbles = std::is_same<Format, Nibble>::value;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int channel = kNibbles && kSorted ? nibble_channel(byte, half, values.head_dim)
                                              : byte / Operand::kBytes * 16 + 8 * half;
      Vec scale, zero;
      if (kChannel) {
        scale = Vec::load((const Half*)(values.scale + scales_at + channel));
      }
      if (kZeroPoints) zero = Vec::load((const Half*)(values.zero_point + scales_at + channel));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* out = acc + r * values.head_dim + channel;
        const Vec factor(row[r].factor), before = Vec::load(out);
        const Vec sum = kHasOffset ? sums[r][half] - Vec(row[r].offset) : sums[r][half];
        if (kZeroPoints) {
          Vec::fma(sum * factor, scale, Vec::fma(Vec(row[r].total), zero, before)).store(out);
        } else if (kChannel) {
          Vec::fma(sum * factor, scale, before).store(out);
        } else {
          Vec::fma(sum, factor, before).store(out);
        }
      }
    }
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
