// How results are put together: warps of a block (through shared memory), then parts of a row.
#pragma once

#include "cuda/part.h"

namespace kvquant {

// The warps' sums are added in a tree: half of the warps hand theirs to the other half, and so on.
// What they hand over lies as it lies in registers, [part][lane][4].
template <class P>
struct BlockMerge {
  using V = typename P::V;

  static KVQUANT_DEVICE void write(P& part, const Partials& partials, int index) {
    const Place& p = part.p;
    const auto states = shared_cast<Pair>(part.memory + P::kStatesAt);
    if (part.t == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        states[part.warp * kRows + part.g + 8 * r] = Pair{part.softmax.max[r], part.softmax.sum[r]};
      }
    }
    block_barrier();
    float max[2], sum[2], factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = -infinity();
      sum[r] = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        const Pair state = states[w * kRows + part.g + 8 * r];
        max[r] = fmaxf(max[r], state.x);
      }
      for (int w = 0; w < kWarps; ++w) {
        const Pair state = states[w * kRows + part.g + 8 * r];
        sum[r] += state.y * (state.x == -infinity() ? 0.0f : exp2_approx(state.x - max[r]));
      }
      factor[r] =
          part.softmax.max[r] == -infinity() ? 0.0f : exp2_approx(part.softmax.max[r] - max[r]);
    }
    finish_sums(part, factor);
    add_warps(part);
    if (part.warp != 0) return;
    const QueryRows rows(p);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = part.g + 8 * r;
      if (!rows.exists(row)) continue;
      const int64_t at = partials.at(rows.output_row(p, row), index);
      if (part.t == 0) {
        global_store(reinterpret_cast<Pair*>(partials.states) + at, Pair{max[r] * kLn2, sum[r]});
      }
      store_row(part, r, partials.sums + at * kValueDim);
    }
  }

 private:
  // Units, offset and reference are undone, and the warp's base becomes the block's.
  static KVQUANT_DEVICE void finish_sums(P& part, const float (&factor)[2]) {
    const float unit = (P::ValueScales::kGroups > 0 ? part.reference : 1.0f) / kWeightUnit;
#pragma unroll
    for (int i = 0; i < V::kParts; ++i) {
      float up = V::unit(i);
      if constexpr (P::kCentred) up = V::unit_centred(i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x = part.acc[i][e] * up;
        if constexpr (P::kHasOffset && !P::kCentred) x -= V::kOffset * part.weight_sum[e];
        part.acc[i][e] = x * (unit * factor[e / 2]);
      }
    }
  }
  static KVQUANT_DEVICE void add_warps(P& part) {
    const auto memory = shared_cast<Words4>(part.memory);
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) {
      // Before the first step all warps have read their last tile: they met at a barrier.
      if (part.warp >= half && part.warp < 2 * half) {
#pragma unroll
        for (int i = 0; i < V::kParts; ++i) {
          const float (&x)[4] = part.acc[i];
          memory[((part.warp - half) * V::kParts + i) * 32 + part.lane] =
              Words4{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
        }
      }
      block_barrier();
      if (part.warp < half) {
#pragma unroll
        for (int i = 0; i < V::kParts; ++i) {
          const Words4 other = memory[(part.warp * V::kParts + i) * 32 + part.lane];
          part.acc[i][0] += bits_float(other.x);
          part.acc[i][1] += bits_float(other.y);
          part.acc[i][2] += bits_float(other.z);
          part.acc[i][3] += bits_float(other.w);
        }
      }
      if (half > 1) block_barrier();
    }
  }

  // A lane's numbers of two neighbouring parts are four neighbouring channels (dense: two each).
  static KVQUANT_DEVICE void store_row(const P& part, int r, float* to) {
#pragma unroll
    for (int i = 0; i < V::kParts; i += 2) {
      const int channel = V::channel(i, 2 * part.t);
      const float (&x)[4] = part.acc[i];
      const float (&y)[4] = part.acc[i + 1];
      if constexpr (V::kIsDense) {
        global_store(reinterpret_cast<Pair*>(to + channel), Pair{x[2 * r], x[2 * r + 1]});
        global_store(reinterpret_cast<Pair*>(to + channel + 8), Pair{y[2 * r], y[2 * r + 1]});
      } else if (channel >= 0) {
        store_16(to + channel, Words4{float_bits(x[2 * r]), float_bits(y[2 * r]),
                                      float_bits(x[2 * r + 1]), float_bits(y[2 * r + 1])});
      }
    }
  }
};

// One (batch row, head, query): its parts, in their order but dealt out to the warps.
//   warp w, lane l   weights of the parts w + kWarps * l, w + kWarps * (l + 32), ..
//   warp w           sums of these parts, a WarpRow each; stored and copied values apart, because
//                    only the stored ones may be rotated
//   warp 0           adds the warps, rotates, adds the learned sink, writes
struct RowMerge {
  using Row = WarpRow<kValueDim>;
  static constexpr int kFloats = Row::kRounds * 128;
  static constexpr int kBytes = 4 * (2 * kFloats + 1) * kWarps;

  const KvquantAttention& a;
  const Partials partials;
  const SharedPtr<float> memory;

  KVQUANT_DEVICE void run(int batch, int head, int query) const {
    const int warp = warp_index(), lane = lane_index();
    const int64_t row = (int64_t(batch) * a.num_heads + head) * a.q_len + query;
    const int parts = partials.extra + (Place::length(a) + kSplit - 1) / kSplit;
    const auto* states = reinterpret_cast<const Pair*>(partials.states) + partials.at(row, 0);

    SoftmaxState total;
    for (int i = lane; i < parts; i += 32) {
      const Pair state = global_load(states + i);
      total.max = fmaxf(total.max, state.x);
    }
    total.max = warp_max(total.max);
    Row stored{}, copied{};
    float sum = 0.0f;
    for (int first = warp; first < parts; first += 32 * kWarps) {
      const int mine = first + lane * kWarps;
      const Pair state = mine < parts ? global_load(states + mine) : Pair{-infinity(), 0.0f};
      const float weight = state.x == -infinity() ? 0.0f : expf(state.x - total.max);
      sum += weight * state.y;
      const int used = state.y != 0.0f;  // else nothing was written; NaN is used
      const int here = (parts - first + kWarps - 1) / kWarps;
#pragma unroll 4
      for (int j = 0; j < (here < 32 ? here : 32); ++j) {
        const int part = first + j * kWarps;
        add(shuffle(used, j) ? partials.sums + partials.at(row, part) * kValueDim : nullptr,
            shuffle(weight, j), part == kCopiedBoth || part == kCopiedValues, stored, copied);
      }
    }
    sum = warp_sum(sum);
    hand_over(warp, lane, stored, copied, sum);
    block_barrier();
    if (warp != 0) return;
    for (int w = 1; w < kWarps; ++w) {
      const float other = memory[2 * kFloats * kWarps + w];
      sum += other;
      for (int r = 0; r < Row::kRounds; ++r) {
        for (int i = 0; i < 4; ++i) {
          const float x = memory[place(w, 0, r, lane) + i], y = memory[place(w, 1, r, lane) + i];
          stored.x[r][i] += x;
          copied.x[r][i] += y;
        }
      }
    }
    total.sum = sum;
    if constexpr (StoredValues::kRotated) stored.rotate();
    finish(row, head, total, stored, copied);
  }

 private:
  KVQUANT_DEVICE void add(const float* sums, float weight, bool is_copied, Row& stored,
                          Row& copied) const {
#pragma unroll
    for (int r = 0; r < Row::kRounds; ++r) {
      const int c = Row::channel(r);
      Words4 x = {0u, 0u, 0u, 0u};
      if (sums && c < kValueDim) x = load_16(sums + c);
      const float four[4] = {bits_float(x.x), bits_float(x.y), bits_float(x.z), bits_float(x.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = weight * four[i];
        stored.x[r][i] += partials.extra && is_copied ? 0.0f : product;
        copied.x[r][i] += partials.extra && is_copied ? product : 0.0f;
      }
    }
  }
  static KVQUANT_DEVICE int place(int warp, int which, int r, int lane) {
    return ((2 * warp + which) * Row::kRounds + r) * 128 + 4 * lane;
  }
  KVQUANT_DEVICE void hand_over(int warp, int lane, const Row& stored, const Row& copied,
                                float sum) const {
    for (int r = 0; r < Row::kRounds; ++r) {
      for (int i = 0; i < 4; ++i) {
        memory[place(warp, 0, r, lane) + i] = stored.x[r][i];
        memory[place(warp, 1, r, lane) + i] = copied.x[r][i];
      }
    }
    if (lane == 0) memory[2 * kFloats * kWarps + warp] = sum;
  }
  KVQUANT_DEVICE void finish(int64_t row, int head, SoftmaxState total, const Row& stored,
                             const Row& copied) const {
    float ours = 1.0f;
    if (a.s_aux) {  // one more column, without a value
      SoftmaxState sink;
      sink.max = global_load(a.s_aux + head);
      sink.sum = 1.0f;
      ours = total.merge(sink).ours;
    }
    const float norm = ours * total.finish();
    auto* output = reinterpret_cast<uint16_t*>(a.output) + row * kValueDim;
#pragma unroll
    for (int r = 0; r < Row::kRounds; ++r) {
      const int c = Row::channel(r);
      if (c >= kValueDim) continue;
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = (stored.x[r][i] + copied.x[r][i]) * norm;
      using Output = Dense16<kValueDim, kIsBFloat16>;
      global_store(reinterpret_cast<Words2*>(output + c),
                   Words2{pack<Output>(x[0], x[1]), pack<Output>(x[2], x[3])});
    }
    if (lane_index() == 0) global_store(a.logsumexp + row, total.logsumexp());
  }
};

}  // namespace kvquant
