// Writes new tokens into the storage of keys and values, in the steps of
// hf_kvquant/quantization.py, bit for bit.
//
//   first   for each side and head, in parallel:
//             chunks of kChunk tokens    count those that are not finite; token grid: quantize;
//                                        dense: copy
//             channel grid               quantize each block that the new tokens complete; its
//                                        earlier columns come from the ring
//   then    for each side and head, in parallel: the ring, which the blocks have read by now, and
//           the sinks
#pragma once

#include <atomic>
#include <cstring>

#include "cpu/nibbles.h"
#include "cpu/rotation.h"
#include "cpu/thread_pool.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

constexpr int kChunk = 64;
constexpr int kMaxBlock = 256;
constexpr int kFeedbackTokens = 64;           // of a block, taken at once
constexpr int64_t kInlineElements = 1 << 17;  // fewer are done before another thread wakes up

inline uint32_t lowest_lanes() { return (1u << Vec::kWidth) - 1; }

// The length of a block in whole kFeedbackTokens.
inline int padded_length(int count) {
  return (count + kFeedbackTokens - 1) / kFeedbackTokens * kFeedbackTokens;
}

// Quantizes one group of the token grid; returns its scale. `codes`: one byte per element.
template <class Format>
uint16_t quantize_group(const float* x, int n, uint8_t* codes) {
  constexpr int W = Vec::kWidth;
  constexpr float kToScale = float(Format::kTokenSpan / double(Format::kReach));
  Vec absmax(0.0f);
  uint32_t finite = lowest_lanes();
  for (int c = 0; c < n; c += W) {
    Vec v = Vec::load(x + c);
    finite &= Vec::finite(v);
    absmax = Vec::max(absmax, Vec::abs(v));
  }
  uint16_t scale = kFp16Nan;
  if (finite == lowest_lanes()) {
    float s = Vec::largest(absmax) * kToScale;
    scale = to_half(s < kFp16Max ? s : kFp16Max).bits;
  }
  const float r = 1.0f / to_float(Half{scale});
  if (!(r < __builtin_inff())) {  // scale 0 or NaN
    std::memset(codes, int(Format::kMidpoint + 0.5f), n);
    return scale;
  }
  for (int c = 0; c < n; c += W) {
    Vec y = Vec::load(x + c) * Vec(r);
    if (Format::kMidpoint != 0.0f) {
      y = Vec::round(y + Vec(Format::kMidpoint));
      y = Vec::min(Vec::max(y, Vec(0.0f)), Vec(Format::kLevels));
    } else {
      if (!Format::kIsFloat) y = Vec::round(y);
      y = Vec::min(Vec::max(y, Vec(-Format::kReach)), Vec(Format::kReach));
    }
    y.store_codes(typename Format::Code{}, codes + c);
  }
  return scale;
}

// The smallest and the largest counted element of each lane, infinities where there is none. Where
// Format is symmetric: `high` is the largest magnitude.
template <class Format>
struct Extremes {
  static constexpr bool kSymmetric = Format::kLevels == 0.0f;
  Vec low{__builtin_inff()}, high{kSymmetric ? 0.0f : -__builtin_inff()};

  void add(Vec x, uint32_t counted) {
    counted &= Vec::finite(x);
    if (kSymmetric) x = Vec::abs(x);
    if (!kSymmetric) low = Vec::where(counted, Vec::min(low, x), low);
    high = Vec::where(counted, Vec::max(high, x), high);
  }
};

// Scales and zero points of the channel grid, a channel in each lane.
template <class Format>
struct ChannelGrid {
  static constexpr bool kSymmetric = Extremes<Format>::kSymmetric;
  alignas(64) Half scales[Vec::kWidth], zero_points[Vec::kWidth];
  Vec zero{0.0f}, scale, r;
  uint32_t usable;

  explicit ChannelGrid(Vec low, Vec high) {
    const Vec nothing(0.0f), limit(kFp16Max);
    const auto limited = [&](Vec x) { return Vec::max(Vec::min(x, limit), nothing - limit); };
    Vec range = high * Vec(float(1.0 / double(Format::kReach)));
    if (!kSymmetric) {
      const uint32_t any = Vec::finite(low);
      // Adding 0 turns -0 into +0: the minimum of both zeros may be either one, and the bytes must
      // not depend on it.
      low = Vec::where(any, low, nothing) + nothing;
      high = Vec::where(any, high, nothing) + nothing;
      if (Format::kChannelSpan < 1.0) {
        // The difference of two products, because high - low may overflow.
        const Vec part(float((1.0 - Format::kChannelSpan) / 2.0));
        const Vec margin = high * part - low * part;
        low = low + margin;
        high = high - margin;
      }
      limited(low).store(zero_points);
      zero = Vec::load(zero_points);
      range = (high - zero) * Vec(float(1.0 / double(Format::kLevels)));
    }
    limited(range).store(scales);
    scale = Vec::load(scales);
    r = Vec(1.0f) / scale;
    usable = Vec::finite(r);
  }

  // Not rounded where Format is a float: storing rounds it.
  Vec code(Vec x) const {
    const Vec nothing(0.0f);
    Vec y;
    if (kSymmetric) {
      y = Vec::min(Vec::max(x * r, Vec(-Format::kReach)), Vec(Format::kReach));
    } else {
      y = Vec::round((x - zero) * r);
      y = Vec::min(Vec::max(y, nothing), Vec(Format::kLevels));
    }
    return Vec::where(usable & Vec::not_nan(x), y, nothing);
  }

  Vec decoded(Vec code) const { return kSymmetric ? code * scale : zero + code * scale; }
};

// One block of the channel grid: `count` rows of T, of which those that are `counted` determine the
// scales. `codes`: `[count, head_dim]`.
struct Block {
  const uint8_t* rows[kMaxBlock];
  bool counted[kMaxBlock];
  int count, head_dim;
  uint16_t *scale, *zero_point;
  uint8_t* codes;
};

template <class Format, class T>
void quantize_block(const Block& block) {
  for (int c = 0; c < block.head_dim; c += Vec::kWidth) {
    const auto load = [&](int t) { return Vec::load((const T*)block.rows[t] + c); };
    Extremes<Format> found;
    for (int t = 0; t < block.count; ++t)
      if (block.counted[t]) found.add(load(t), lowest_lanes());
    const ChannelGrid<Format> grid(found.low, found.high);
    std::memcpy(block.scale + c, grid.scales, sizeof(grid.scales));
    if (!grid.kSymmetric)
      std::memcpy(block.zero_point + c, grid.zero_points, sizeof(grid.zero_points));
    for (int t = 0; t < block.count; ++t)
      grid.code(load(t)).store_codes(typename Format::Code{}, block.codes + t * block.head_dim + c);
  }
}

// The same with error feedback, a token in each lane. `x`: memory for `[head_dim, padded_length]`
// floats: the elements of channels that are still to come, and the errors of those done.
//
// The last channel is the first. Channel c takes what all channels after it have left for it when
// its own turn comes, in their order: the same steps as if each of them had changed all others that
// are still to come, with fewer stores.
template <class Format, class T>
void quantize_with_feedback(const Block& block, const float* factors, float* x) {
  constexpr int W = Vec::kWidth, kGroup = kFeedbackTokens / W;
  const int length = padded_length(block.count), head_dim = block.head_dim;
  uint32_t counted[kMaxBlock / W] = {};
  for (int t = 0; t < length; ++t) {
    alignas(64) float row[kMaxHeadDim] = {};
    if (t < block.count) {
      counted[t / W] |= uint32_t(block.counted[t]) << t % W;
      for (int c = 0; c < head_dim; c += W) Vec::load((const T*)block.rows[t] + c).store(row + c);
    }
    for (int c = 0; c < head_dim; ++c) x[c * length + t] = row[c];
  }
  for (int c = head_dim - 1; c >= 0; --c) {
    float* own = x + c * length;
    Extremes<Format> found;
    for (int first = 0; first < length; first += kFeedbackTokens) {
      Vec v[kGroup];
      for (int g = 0; g < kGroup; ++g) v[g] = Vec::load(own + first + g * W);
      for (int i = head_dim - 1; i > c; --i) {
        const Vec factor(factors[i * head_dim + c]);
        const float* error = x + i * length + first;
        for (int g = 0; g < kGroup; ++g) v[g] = v[g] - factor * Vec::load(error + g * W);
      }
      for (int g = 0; g < kGroup; ++g) {
        v[g].store(own + first + g * W);
        found.add(v[g], counted[first / W + g]);
      }
    }
    const Vec low(-Vec::largest(Vec(0.0f) - found.low)), high(Vec::largest(found.high));
    const ChannelGrid<Format> grid(low, high);
    block.scale[c] = grid.scales[0].bits;
    if (!grid.kSymmetric) block.zero_point[c] = grid.zero_points[0].bits;
    uint8_t codes[kMaxBlock];
    for (int t = 0; t < length; t += W) {
      const Vec element = Vec::load(own + t), code = grid.code(element);
      code.store_codes(typename Format::Code{}, codes + t);
      // Storing has rounded the code of a float.
      const Vec stored = Format::kIsFloat ? Vec::decode(E4M3{}, codes, t, head_dim) : code;
      const Vec error = element - grid.decoded(stored);
      Vec::where(Vec::finite(error), error, Vec(0.0f)).store(own + t);
    }
    for (int t = 0; t < block.count; ++t) block.codes[t * head_dim + c] = codes[t];
  }
}

template <class T>
struct QuantizeAppend {
  const KvquantAppend& a;
  const KvquantNewTokens* sides[2];
  std::atomic<int64_t> nonfinite{0};
  std::atomic<bool> no_memory{false};

  explicit QuantizeAppend(const KvquantAppend& a) : a(a), sides{&a.keys, &a.values} {}

  static int64_t num_chunks(const KvquantNewTokens& x) { return (x.n + kChunk - 1) / kChunk; }
  int64_t num_blocks(const KvquantNewTokens& x) const {
    if (x.side.format == kDense || x.side.grid != kChannelGrid) return 0;
    const int64_t length = x.side.group_length;
    if (a.pages.table) return (x.n + length - 1) / length;  // at most, in any row
    return (a.start + x.n) / length - a.start / length;
  }

  bool run() {
    const int64_t heads = a.batch * a.num_kv_heads;
    const int64_t chunks[2] = {num_chunks(a.keys), num_chunks(a.values)};
    const int64_t per_head[2] = {chunks[0] + num_blocks(a.keys), chunks[1] + num_blocks(a.values)};
    int64_t elements = 0;
    for (const KvquantNewTokens* x : sides) {
      elements += heads * x->side.head_dim * (x->n + num_blocks(*x) * x->side.group_length);
    }
    const int64_t threads = elements < kInlineElements ? 1 : a.threads;

    auto write = [&](int64_t i) {
      const int side = i >= heads * per_head[0];
      if (side) i -= heads * per_head[0];
      const int64_t head = i / per_head[side], task = i % per_head[side];
      const int64_t b = head / a.num_kv_heads, h = head % a.num_kv_heads;
      if (task < chunks[side]) {
        write_chunk(*sides[side], b, h, task);
      } else {
        const int64_t length = sides[side]->side.group_length, start = start_of(b);
        const int64_t block = start / length + task - chunks[side];
        if ((block + 1) * length <= start + sides[side]->n) write_block(*sides[side], b, h, block);
      }
    };
    parallel_for(heads * (per_head[0] + per_head[1]), threads, write);
    auto copies = [&](int64_t i) {
      const int64_t b = i % heads / a.num_kv_heads, h = i % heads % a.num_kv_heads;
      write_ring(*sides[i >= heads], b, h);
      write_sinks(*sides[i >= heads], b, h);
    };
    parallel_for(2 * heads, threads, copies);
    for (int64_t b = 0; b < a.batch && a.pages.table == nullptr; ++b)
      for_each_new_sink(b, a.keys.n,
                        [&](int64_t slot, int64_t t) { sink_positions(b)[slot] = int32_t(t); });
    a.faults[0] += nonfinite.load();
    return !no_memory;
  }

  // The number of columns that batch row b had before.
  int64_t start_of(int64_t b) const { return a.pages.table ? a.pages.lengths[b] : a.start; }

  const uint8_t* new_row(const KvquantNewTokens& x, int64_t b, int64_t h, int64_t t) const {
    return x.x + b * x.x_stride[0] + h * x.x_stride[1] + (t - start_of(b)) * x.x_stride[2];
  }
  uint8_t* ring_row(const KvquantSide& side, int64_t b, int64_t h, int64_t t) const {
    return side.recent + exact_row(a.pages, b) * side.recent_stride[0] + h * side.recent_stride[1] +
           t % side.ring_length * side.head_dim * int64_t(sizeof(T));
  }

  bool is_padding(int64_t b, int64_t t) const {
    return a.padding && t < a.padding_length && a.padding[b * a.padding_stride + t];
  }
  int32_t* sink_positions(int64_t b) const {
    return (int32_t*)((uint8_t*)a.sink_positions + b * a.sink_positions_stride);
  }
  // Calls take(slot, column) for each of the n new tokens of batch row b that become sinks.
  template <class Take>
  void for_each_new_sink(int64_t b, int64_t n, Take take) const {
    int64_t slot = 0;
    if (a.pages.table) {
      for (int64_t t = start_of(b); t < start_of(b) + n && t < a.num_sinks; ++t) take(t, t);
      return;
    }
    while (slot < a.num_sinks && sink_positions(b)[slot] >= 0 && sink_positions(b)[slot] < a.start)
      ++slot;
    for (int64_t t = a.start; t < a.start + n && slot < a.num_sinks; ++t) {
      if (!is_padding(b, t)) take(slot++, t);
    }
  }

  void write_chunk(const KvquantNewTokens& x, int64_t b, int64_t h, int64_t chunk) {
    const KvquantSide& side = x.side;
    const int head_dim = int(side.head_dim);
    const int64_t first = start_of(b) + chunk * kChunk, end = start_of(b) + x.n;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) uint8_t codes[kMaxHeadDim];
    const int64_t bytes = row_bytes(side, a.dtype), groups = num_scales(side);
    int64_t bad = 0;
    for (int64_t t = first; t < first + kChunk && t < end; ++t) {
      const Place place = place_of(a.pages, b, t);
      const int64_t at = t - place.first;
      uint8_t* data = side.data + place.row * side.data_stride[0] + h * side.data_stride[1];
      uint16_t* scale =
          side.scale + (place.row * side.scale_stride[0] + h * side.scale_stride[1]) / 2;
      const uint8_t* from = new_row(x, b, h, t);
      uint32_t finite = lowest_lanes();
      for (int c = 0; c < head_dim; c += Vec::kWidth) {
        Vec v = Vec::load((const T*)from + c);
        finite &= Vec::finite(v);
        v.store(row + c);
      }
      bad += finite != lowest_lanes();
      if (side.format == kDense) {
        std::memcpy(data + at * bytes, from, bytes);
      } else if (side.grid == kTokenGrid) {
        if (side.rotate) rotate(row, head_dim);
        const int n = int(side.group_length);
        for (int g = 0; g < groups; ++g) {
          scale[at * groups + g] =
              side.format == kInt8   ? quantize_group<Signed8>(row + g * n, n, codes + g * n)
              : side.format == kFp8  ? quantize_group<E4M3>(row + g * n, n, codes + g * n)
              : side.format == kInt4 ? quantize_group<Nibble>(row + g * n, n, codes + g * n)
              : side.format == kInt3 ? quantize_group<ThreeBits>(row + g * n, n, codes + g * n)
                                     : quantize_group<TwoBits>(row + g * n, n, codes + g * n);
        }
        write_codes(side, codes, data + at * bytes);
      }
    }
    if (bad) nonfinite += bad;
  }

  void write_block(const KvquantNewTokens& x, int64_t b, int64_t h, int64_t index) {
    const KvquantSide& side = x.side;
    const int length = int(side.group_length), head_dim = int(side.head_dim);
    const size_t elements = size_t(length) * head_dim;
    const size_t floats = x.factors ? size_t(padded_length(length)) * head_dim : 0;
    auto* memory = static_cast<float*>(scratch(kTaskScratch, floats * sizeof(float) + elements));
    if (memory == nullptr) {
      no_memory = true;
      return;
    }
    const Place place = place_of(a.pages, b, index * length);
    const int64_t first = index * length - place.first;
    const int64_t at = (place.row * side.scale_stride[0] + h * side.scale_stride[1]) / 2 +
                       first / length * head_dim;
    Block block;
    block.count = length;
    block.head_dim = head_dim;
    block.scale = side.scale + at;
    block.zero_point = side.zero_point ? side.zero_point + at : nullptr;
    block.codes = (uint8_t*)(memory + floats);
    for (int i = 0; i < length; ++i) {
      const int64_t t = index * length + i;
      block.rows[i] = t < start_of(b) ? ring_row(side, b, h, t) : new_row(x, b, h, t);
      block.counted[i] = !is_padding(b, t);
    }
    const float* factors = x.factors ? x.factors + h * head_dim * head_dim : nullptr;
    if (side.format == kInt8) quantize<Unsigned8>(block, factors, memory);
    if (side.format == kFp8) quantize<E4M3>(block, factors, memory);
    if (side.format == kInt4) quantize<Nibble>(block, factors, memory);
    if (side.format == kInt3) quantize<ThreeBits>(block, factors, memory);
    if (side.format == kInt2) quantize<TwoBits>(block, factors, memory);
    const int64_t bytes = row_bytes(side, a.dtype);
    uint8_t* data =
        side.data + place.row * side.data_stride[0] + h * side.data_stride[1] + first * bytes;
    for (int i = 0; i < length; ++i)
      write_codes(side, block.codes + i * head_dim, data + i * bytes);
  }

  template <class Format>
  static void quantize(const Block& block, const float* factors, float* memory) {
    if (factors) {
      quantize_with_feedback<Format, T>(block, factors, memory);
    } else {
      quantize_block<Format, T>(block);
    }
  }

  static void write_codes(const KvquantSide& side, const uint8_t* codes, uint8_t* row) {
    if (is_packed(side.format)) {
      pack_codes(side.format, codes, int(side.head_dim), row);
    } else {
      std::memcpy(row, codes, side.head_dim);
    }
  }

  void write_ring(const KvquantNewTokens& x, int64_t b, int64_t h) {
    if (x.side.recent == nullptr) return;
    const int64_t start = start_of(b), end = start + x.n,
                  first = end - x.side.ring_length > start ? end - x.side.ring_length : start;
    for (int64_t t = first; t < end; ++t) {
      std::memcpy(ring_row(x.side, b, h, t), new_row(x, b, h, t), x.side.head_dim * sizeof(T));
    }
  }

  void write_sinks(const KvquantNewTokens& x, int64_t b, int64_t h) {
    if (x.side.sink == nullptr) return;
    const int64_t bytes = x.side.head_dim * int64_t(sizeof(T));
    uint8_t* sink =
        x.side.sink + exact_row(a.pages, b) * x.side.sink_stride[0] + h * x.side.sink_stride[1];
    for_each_new_sink(b, x.n, [&](int64_t slot, int64_t t) {
      std::memcpy(sink + slot * bytes, new_row(x, b, h, t), bytes);
    });
  }
};

inline bool quantize_append(const KvquantAppend& a) {
  if (a.dtype == kFloat32) return QuantizeAppend<float>(a).run();
  if (a.dtype == kFloat16) return QuantizeAppend<Half>(a).run();
  return QuantizeAppend<BFloat16>(a).run();
}

}  // namespace KVQUANT_ISA
}  // namespace kvquant
