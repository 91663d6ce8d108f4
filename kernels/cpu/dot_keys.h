// Scores of a tile of columns in dot products of stored codes, for AVX2 and NEON. The loops over
// channels, `dot_columns`, are in keys.h of each instruction set.
#pragma once

#include "cpu/folding.h"
#include "keys.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Before scaling, an element is code - midpoint; on the channel grid the midpoint is 0. Operands may
// multiply code - kBias.
template <class Operand, bool kChannel>
struct DotKeys {
  using Format = typename Operand::Format;
  using Maker = typename Operand::KeyMaker;
  static constexpr bool kHasOffset =
      (!kChannel && Format::kMidpoint != 0.0f) || Operand::kBias != 0.0f;

  // A query row as weights; on the channel grid it is first multiplied by the scales of a block.
  struct alignas(32) Row {
    typename Operand::Weight weights[kMaxDotDim * Maker::kRoom];
    float factor;
    float offset[kMaxGroups];  // subtracted from the dot product of each group
    float zero;                // query x zero points, added to every score of a block
  };

  static constexpr bool kRounds = Operand::kRounds;
  static float factor(const Largest& x, int n) { return Operand::factor(x, n); }

  static size_t prepared_bytes(const Body&, int rows) {
    return kChannel ? Folding<DotKeys>::prepared_bytes(rows) : rows * sizeof(Row);
  }

  static void prepare(const Body& keys, const float* q, int rows, void* prepared) {
    if (kChannel) return Folding<DotKeys>::prepare(prepared);
    Row* row = static_cast<Row*>(prepared);
    const int length = int(keys.group_length);
    for (int r = 0; r < rows; ++r, ++row, q += keys.head_dim) {
      Largest largest;
      for (int c = 0; c < keys.head_dim; c += Vec::kWidth) largest.take(Vec::load(q + c));
      row->factor = factor(largest, keys.head_dim);
      const Vec inverse(Maker::inverse(row->factor));
      for (int g = 0; g < keys.num_scales; ++g)
        set_weights(keys, g, length, row,
                    [&](int c) { return Vec::load(q + g * length + c) * inverse; });
    }
  }

  static void score(const Body& keys, int64_t first, int n, uint64_t, const float* q,
                    void* prepared, int rows, float* scores) {
    const Row* row = kChannel ? Folding<DotKeys>::fold(keys, first, q, rows, prepared)
                              : static_cast<const Row*>(prepared);
    alignas(32) uint8_t room[kTileRoom<Operand>];
    Tile tile = tile_of(Operand{}, keys, first, n, room);

    const int groups = kChannel ? 1 : int(keys.num_scales), channels = keys.head_dim / groups;
    alignas(32) float scale[kTile];
    for (int g = 0; g < groups; ++g, tile.rows += channels / 16 * Operand::kBytes) {
      if (!kChannel) load_scales(keys, g, first, n, scale);
      for_row_blocks<Operand::kKeyRows>(rows, [&](int r, auto block) {
        score_rows<block>(tile, channels, row + r, g, scale, scores + r * kTile);
      });
    }
  }

  // As `Folding` asks for it.
  template <int kRows>
  KVQUANT_NOINLINE static void fold(const Body& keys, int64_t block, const DividedQuery* query,
                                    Row* row) {
    const int n = keys.head_dim;
    const auto* scales = (const Half*)(keys.scale + block * n);
    const auto* zeros = (const Half*)(keys.zero_point ? keys.zero_point + block * n : nullptr);
    alignas(32) float scale[kMaxDotDim];
    Vec zero[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) zero[r] = Vec(0.0f);
    for (int c = 0; c < n; c += Vec::kWidth) {
      Vec::load(scales + c).store(scale + c);
      if (!zeros) continue;
      const Vec z = Vec::load(zeros + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) zero[r] = Vec::fma(Vec::load(query[r].q + c), z, zero[r]);
    }
    for (int r = 0; r < kRows; ++r) {
      row[r].factor = query[r].factor;
      row[r].zero = query[r].factor * Vec::sum(zero[r]);
      set_weights(keys, 0, n, row + r,
                  [&](int c) { return Vec::load(query[r].q + c) * Vec::load(scale + c); });
    }
  }

 private:
  // Makes the weights of group g, of n channels, from the floats x.
  template <class Floats>
  static void set_weights(const Body& keys, int g, int n, Row* row, Floats x) {
    Maker maker;
    maker.make_group(x, n, row->weights + g * Maker::room(n));
    row->offset[g] = kHasOffset ? (keys.midpoint - Operand::kBias) * maker.sum() : 0.0f;
  }

  // Scores of a tile and kRows query rows over the channels of group g, which `tile` begins with.
  // `scale`: the columns' scales, on the token grid.
  template <int kRows>
  KVQUANT_NOINLINE static void score_rows(Tile tile, int channels, const Row* row, int g,
                                          const float* scale, float* scores) {
    for (int i = 0; i < kTile; i += Vec::kWidth, scores += Vec::kWidth) {
      Vec totals[kRows];
      dot_columns<kRows>(Operand{}, tile.rows + i * tile.row_bytes, tile.row_bytes, channels, row,
                         g * Maker::room(channels), totals);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec factor(row[r].factor);
        const Vec sum = kHasOffset ? totals[r] - Vec(row[r].offset[g]) : totals[r];
        const Vec s = kChannel ? Vec::fma(sum, factor, Vec(row[r].zero))
                               : sum * factor * Vec::load(scale + i);
        float* out = scores + r * kTile;
        (g == 0 ? s : s + Vec::load(out)).store(out);
      }
    }
  }
};

}  // namespace KVQUANT_ISA
}  // namespace kvquant
