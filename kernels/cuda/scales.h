// How scales get to the warp that uses them.
//
//   token grid     loaded into registers one tile ahead, because rows begin at multiples of 2 bytes
//                  and cp.async needs 4; then stored in shared memory as floats [group][column],
//                  where a lane reads the scales of its two columns at once (layout.h); 0 for columns that are
//                  not in `bits`
//   channel grid   rows of scales and of zero points, the header of a block, are copied by cp.async,
//                  in FP16
#pragma once

#include "cuda/columns.h"
#include "cuda/layout.h"
#include "cuda/softmax.h"
#include "cuda/warp_row.h"

namespace kvquant {

template <class S, int kTile>
struct TokenScales {
  using Lanes = Layout<kRows>;
  static constexpr int kGroups = S::kGroups;
  static constexpr int kNumbers = kTile * kGroups, kEach = (kNumbers + 31) / 32;
  static constexpr int kBytes = 4 * kNumbers;

  const KvquantSide& side;
  const Place& p;
  const uint16_t* from;  // of column 0, without pages
  SharedPtr<float> to;
  uint16_t next[kEach > 0 ? kEach : 1];

  KVQUANT_DEVICE TokenScales(const KvquantSide& side, const Place& p, SharedPtr<uint8_t> memory)
      : side(side), p(p), from(nullptr), to(shared_cast<float>(memory)) {
    if constexpr (kGroups > 0 && !kPaged) from = p.of_column(side.scale, side.scale_stride, 0);
  }
  // The column of the tile, and the group, of scale i of this lane.
  static KVQUANT_DEVICE int row(int i) {
    return (lane_index() + 32 * i) / (kGroups > 0 ? kGroups : 1);
  }
  static KVQUANT_DEVICE int group(int i) {
    return (lane_index() + 32 * i) % (kGroups > 0 ? kGroups : 1);
  }

  template <class TheColumns>
  KVQUANT_DEVICE void fetch(const TheColumns& columns, int first) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = row(i) < kTile ? columns.column(first + row(i)) : -1;
      next[i] = column < 0 ? uint16_t(0) : global_load(scales(column) + group(i));
    }
  }
  // The scales of a column, or of this block's share of it.
  KVQUANT_DEVICE const uint16_t* scales(int column) const {
    const uint16_t* const first =
        kPaged ? p.of_column(side.scale, side.scale_stride, column) : from;
    const int share = p.part<S>() * S::Codec::kChannels / larger_of(S::kGroup, 1);
    return first + (int64_t(in_storage(column)) * S::kRowGroups + share);
  }
  KVQUANT_DEVICE float value(int i, uint32_t bits) const {
    return row(i) < kTile && (bits >> row(i) & 1u) ? half_low(next[i]) : 0.0f;
  }
  // Whether a scale of this lane is larger than `reference`.
  KVQUANT_DEVICE bool exceed(uint32_t bits, float reference) const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) found |= value(i, bits) > reference;
    return found;
  }
  KVQUANT_DEVICE float largest(uint32_t bits) const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) largest = fmaxf(largest, value(i, bits));
    return warp_max(largest);
  }
  KVQUANT_DEVICE void store(uint32_t bits) const { store_times(bits, 1.0f); }
  KVQUANT_DEVICE void store(uint32_t bits, float reference) const {
    // kWeightUnit / reference, both powers of two; if the reference is 0, so is every scale.
    const uint32_t quotient =
        2 * 0x3f800000u + (uint32_t(kLogWeightUnit) << 23) - float_bits(reference);
    store_times(bits, reference > 0.0f ? bits_float(quotient) : 0.0f);
  }
  // Of the two columns of this lane in product m.
  KVQUANT_DEVICE Floats2 two_columns(int group, int m) const {
    return shared_cast<Floats2>(to)[(group * kTile + Lanes::scale_place(Lanes::column(m, 0))) / 2];
  }

 private:
  KVQUANT_DEVICE void store_times(uint32_t bits, float factor) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = group(i) * kTile + Lanes::scale_place(row(i));
      if (row(i) < kTile) to[place] = value(i, bits) * factor;
    }
  }
};

// The bytes of the header of a block.
template <class S>
constexpr int kHeaderBytes = S::kChannelGrid ? 4 * S::Codec::kChannels : 0;

// Copies the scales, then the zero points, of one block; `scales` points at the head's first block.
template <class S>
KVQUANT_DEVICE void copy_header(const Place& p, const KvquantSide& side, const uint8_t* scales,
                                int block, SharedPtr<uint8_t> to) {
  constexpr int kDim = S::Codec::kChannels;
  const uint8_t* scale =
      scales + int64_t(block) * (2 * kDim * S::kParts) + p.part<S>() * (2 * kDim);
  const int64_t apart =
      reinterpret_cast<int64_t>(side.zero_point) - reinterpret_cast<int64_t>(side.scale);
#pragma unroll
  for (int first = 0; first < kDim / 8; first += 32) {
    const int i = first + lane_index();
    if (i >= kDim / 8) continue;
    cp_async_16(to + 16 * i, scale + 16 * i);
    if (S::kHasZeroPoint) cp_async_16(to + (2 * kDim + 16 * i), scale + apart + 16 * i);
  }
}

// Puts every four neighbouring channels in the order of the operands: even ones, then odd ones.
template <class S>
KVQUANT_DEVICE void order_header(SharedPtr<Words4> header) {
  constexpr int kWords = S::Codec::kChannels / 8 * (S::kHasZeroPoint ? 2 : 1);
#pragma unroll
  for (int first = 0; first < kWords; first += 32) {
    const int i = first + lane_index();
    if (i >= kWords) continue;
    const Words4 x = header[i];
    header[i] = Words4{prmt(x.x, x.y, 0x5410), prmt(x.x, x.y, 0x7632), prmt(x.z, x.w, 0x5410),
                       prmt(x.z, x.w, 0x7632)};
  }
}

// Scales and zero points of this lane's channels of a step.
template <class S>
KVQUANT_DEVICE void load_header(SharedPtr<uint8_t> header, int step, Words2& scale,
                                Words2& points) {
  using K = typename S::Codec;
  // A lane's four channels are neighbours. In a chunk with half the channels, lanes without
  // channels read those of another lane; their queries are zeros.
  const int t = lane_index() % 4;
  const int lane_channel = K::channel(2 * step, 2 * (K::channel(2 * step, 7) < 0 ? t % 2 : t));
  const auto words = shared_cast<Words2>(header);
  scale = words[lane_channel / 4];
  if constexpr (S::kHasZeroPoint) points = words[(K::kChannels + lane_channel) / 4];
}

// Sums of queries x zero points, one for each unit of the codec: of a product's elements.
template <class K>
using ZeroPoints = float[K::kUnits][4];
// The sums that a step of the keys is added to.
template <class K>
KVQUANT_DEVICE float (&of_step(ZeroPoints<K>& zero, int step))[4] {
  return zero[2 * step / K::kPairsOfUnit % K::kUnits];
}

// Multiplies the queries of one step by the scales of a block of keys; adds queries x zero points to
// `zero`.
template <class S>
KVQUANT_DEVICE void to_block(SharedPtr<uint8_t> header, int step,
                             uint32_t (&q)[Layout<kRows>::kQueryWords],
                             ZeroPoints<typename S::Codec>& zero) {
  using K = typename S::Codec;
  using Lanes = Layout<kRows>;
  Words2 scale, points;
  load_header<S>(header, step, scale, points);
  if constexpr (S::kHasZeroPoint) Lanes::add_points(of_step<K>(zero, step), q, points);
#pragma unroll
  for (int i = 0; i < Lanes::kQueryWords; ++i) {
    q[i] = hmul2(q[i], i < Lanes::kQueryWords / 2 ? scale.x : scale.y);
  }
}
// The same for queries in float32, of which `floats` has two elements for each word of a term.
template <class S>
KVQUANT_DEVICE void floats_to_block(SharedPtr<uint8_t> header, int step,
                                    const uint32_t (&floats)[2 * Layout<kRows>::kQueryWords],
                                    uint32_t (&q)[2][Layout<kRows>::kQueryWords],
                                    ZeroPoints<typename S::Codec> (&zero)[2]) {
  using K = typename S::Codec;
  using Lanes = Layout<kRows>;
  constexpr int kWords = Lanes::kQueryWords;
  Words2 scale, points;
  load_header<S>(header, step, scale, points);
  if constexpr (S::kHasZeroPoint) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      split_halves(bits_float(floats[2 * i]), bits_float(floats[2 * i + 1]), kSecondTerm, q[0][i],
                   q[1][i]);
    }
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      Lanes::add_points(of_step<K>(zero[term], step), q[term], points);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t two = i < kWords / 2 ? scale.x : scale.y;
    split_halves(bits_float(floats[2 * i]) * half_low(two),
                 bits_float(floats[2 * i + 1]) * half_high(two), kSecondTerm, q[0][i], q[1][i]);
  }
}
// The products of queries and zero points, in the unit of scores.
template <class K>
KVQUANT_DEVICE float of_zero_points(const ZeroPoints<K>& zero, int e) {
  constexpr float kUnit = 1.0f / K::unit(0);
  float sum = zero[0][e];
#pragma unroll
  for (int i = 1; i < K::kUnits; ++i) {
    sum += K::unit(0) / K::unit(i * K::kPairsOfUnit) * zero[i][e];
  }
  return sum * kUnit;
}

}  // namespace kvquant
