// How partial results are merged: first those of the warps of a block, through shared memory; then
// the slices of a query row.
#pragma once

#include "cuda/pass.h"

namespace kvquant {

// The warps' sums are added in a tree: half of the warps hand theirs to the other half, and so on.
// They are handed over in the order of the registers, [pair][lane][4].
template <class P>
struct BlockMerge {
  using V = typename P::V;
  using Lanes = typename P::Lanes;
  static constexpr int kWarps = P::kWarps, kSums = P::kSums;

  static KVQUANT_DEVICE void write(P& pass, const Partials& partials, int index) {
    const Place& p = pass.p;
    warp_barrier();  // the scales of the last tile have been read
    if (Lanes::leads()) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shared_cast<Floats2>(pass.scales(pass.warp))[Lanes::row(r)] =
            Floats2{pass.softmax.max[r], pass.softmax.sum[r]};
      }
    }
    block_barrier();
    float max[2], sum[2], factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = -infinity();
      sum[r] = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        const Floats2 state = shared_cast<Floats2>(pass.scales(w))[Lanes::row(r)];
        max[r] = fmaxf(max[r], state.x);
      }
      for (int w = 0; w < kWarps; ++w) {
        const Floats2 state = shared_cast<Floats2>(pass.scales(w))[Lanes::row(r)];
        sum[r] += state.y * (state.x == -infinity() ? 0.0f : exp2_approx(state.x - max[r]));
      }
      factor[r] =
          pass.softmax.max[r] == -infinity() ? 0.0f : exp2_approx(pass.softmax.max[r] - max[r]);
    }
    finish_sums(pass, factor);
    add_warps(pass);
    if (pass.warp != 0) return;
    const QueryRows rows(p);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Lanes::row(r);
      if (!rows.exists(row)) continue;
      const int64_t at = partials.at(rows.output_row(p, row), index);
      if (Lanes::leads() && p.share() == 0) {
        global_store(reinterpret_cast<Floats2*>(partials.states) + at,
                     Floats2{max[r] * kLn2, sum[r]});
      }
      store_row(pass, r, partials.sums + at * kValueDim + p.share() * kShareDim);
    }
  }

 private:
  // Removes units, offset and reference from the sums, and makes them relative to the block's
  // maximum instead of the warp's.
  static KVQUANT_DEVICE void finish_sums(P& pass, const float (&factor)[2]) {
    const float unit = (P::ValueScales::kGroups > 0 ? pass.reference : 1.0f) / kWeightUnit;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float up = V::unit(i * Lanes::kPairsOfProduct);  // neighbouring pairs have the same
      if constexpr (P::kCentred) up = V::unit_centred(i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x = pass.acc[i][e] * up;
        if constexpr (P::kHasOffset && !P::kCentred) x -= V::kOffset * pass.weight_sum[e];
        pass.acc[i][e] = x * (unit * factor[Lanes::row_of(e)]);
      }
    }
  }
  static KVQUANT_DEVICE void add_warps(P& pass) {
    const auto memory = shared_cast<Words4>(pass.memory);
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) {
      // The tiles may be overwritten: every warp has passed the barrier after its last one.
      if (pass.warp >= half && pass.warp < 2 * half) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const float (&x)[4] = pass.acc[i];
          memory[((pass.warp - half) * kSums + i) * 32 + pass.lane] =
              Words4{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
        }
      }
      block_barrier();
      if (pass.warp < half) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const Words4 other = memory[(pass.warp * kSums + i) * 32 + pass.lane];
          pass.acc[i][0] += bits_float(other.x);
          pass.acc[i][1] += bits_float(other.y);
          pass.acc[i][2] += bits_float(other.z);
          pass.acc[i][3] += bits_float(other.w);
        }
      }
      if (half > 1) block_barrier();
    }
  }

  static KVQUANT_DEVICE void store_row(const P& pass, int r, float* to) {
    if constexpr (kRows == 8) {
      store_of_8(pass, r, to);
    } else {
      store_of_16(pass, r, to);
    }
  }
  // A lane holds two neighbouring channels in two neighbouring pairs (dense: one channel in each).
  static KVQUANT_DEVICE void store_of_8(const P& pass, int r, float* to) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int channel = V::channel(2 * i, pass.g);
      const float x = pass.acc[i][r], y = pass.acc[i][r + 2];
      if constexpr (V::kIsDense) {
        global_store(to + channel, x);
        global_store(to + channel + 8, y);
      } else if (channel >= 0) {
        global_store(reinterpret_cast<Floats2*>(to + channel), Floats2{x, y});
      }
    }
  }
  // A lane holds four neighbouring channels in two neighbouring pairs (dense: two channels in
  // each).
  static KVQUANT_DEVICE void store_of_16(const P& pass, int r, float* to) {
#pragma unroll
    for (int i = 0; i < V::kPairs; i += 2) {
      const int channel = V::channel(i, 2 * pass.t);
      const float (&x)[4] = pass.acc[i];
      const float (&y)[4] = pass.acc[i + 1];
      if constexpr (V::kIsDense) {
        global_store(reinterpret_cast<Floats2*>(to + channel), Floats2{x[2 * r], x[2 * r + 1]});
        global_store(reinterpret_cast<Floats2*>(to + channel + 8), Floats2{y[2 * r], y[2 * r + 1]});
      } else if (channel >= 0) {
        store_16(to + channel, Words4{float_bits(x[2 * r]), float_bits(y[2 * r]),
                                      float_bits(x[2 * r + 1]), float_bits(y[2 * r + 1])});
      }
    }
  }
};

// Merges the slices of one (batch row, head, query). They are dealt out to the warps in turn:
//   warp w, lane l   weights of the slices w + kWarps * l, w + kWarps * (l + 32), ..
//   warp w           the weighted sum of these slices, as a WarpRow; stored and copied values
//                    apart, because only the stored ones may be rotated. The loads of kAtOnce
//                    slices do not wait for each other: their latency is all of the time
//   warp 0           adds the warps, rotates, adds the learned sink, writes
constexpr int kMergeWarps = 8;

template <int kWarps>
struct RowMerge {
  using Row = WarpRow<kValueDim>;
  static constexpr int kFloats = Row::kRounds * 128;
  static constexpr int kBytes = 4 * (2 * kFloats + 1) * kWarps;
  static constexpr int kAtOnce = 4;

  const KvquantAttention& a;
  const Partials partials;
  const SharedPtr<float> memory;

  KVQUANT_DEVICE void run(int batch, int head, int query) const {
    const int warp = warp_index(), lane = lane_index();
    const int64_t row = (int64_t(batch) * a.num_heads + head) * a.q_len + query;
    const int kv_len = Place::length(a, batch), columns = Splits::columns(a, kv_len);
    const int slices = partials.extra + (kv_len + columns - 1) / columns;
    const auto* states = reinterpret_cast<const Floats2*>(partials.states) + partials.at(row, 0);

    SoftmaxState total;
    for (int i = lane; i < slices; i += 32) {
      const Floats2 state = global_load(states + i);
      total.max = fmaxf(total.max, state.x);
    }
    total.max = warp_max(total.max);
    Row stored{}, copied{};
    float sum = 0.0f;
    for (int first = warp; first < slices; first += 32 * kWarps) {
      const int mine = first + lane * kWarps;
      const float* const sums = partials.sums + partials.at(row, first) * kValueDim;
      const Floats2 state = mine < slices ? global_load(states + mine) : Floats2{-infinity(), 0.0f};
      const float weight = state.x == -infinity() ? 0.0f : expf(state.x - total.max);
      sum += weight * state.y;
      // A slice whose sum is 0 has no sums of values. NaN counts as used.
      const uint32_t used = warp_ballot(state.y != 0.0f);
      for (int j = 0; j < 32 && first + j * kWarps < slices; j += kAtOnce) {
        Words4 x[kAtOnce][Row::kRounds];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          load(sums + (j + k) * (kWarps * kValueDim), (used >> (j + k) & 1u) != 0, x[k]);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int slice = first + (j + k) * kWarps;
          add(x[k], shuffle(weight, j + k), slice == kCopiedBoth || slice == kCopiedValues, stored,
              copied);
        }
      }
    }
    sum = warp_sum(sum);
    hand_over(warp, lane, stored, copied, sum);
    block_barrier();
    if (warp != 0) return;
    const auto words = shared_cast<Words4>(memory);
#pragma unroll 2
    for (int w = 1; w < kWarps; ++w) {
      const float other = memory[2 * kFloats * kWarps + w];
      sum += other;
#pragma unroll
      for (int r = 0; r < Row::kRounds; ++r) {
        const Words4 x = words[place(w, 0, r, lane) / 4], y = words[place(w, 1, r, lane) / 4];
        add_four(stored.x[r], x);
        add_four(copied.x[r], y);
      }
    }
    total.sum = sum;
    if constexpr (StoredValues::kRotated) stored.rotate();
    finish(row, head, total, stored, copied);
  }

 private:
  KVQUANT_DEVICE void load(const float* sums, bool is_used, Words4 (&x)[Row::kRounds]) const {
#pragma unroll
    for (int r = 0; r < Row::kRounds; ++r) {
      const int c = Row::channel(r);
      x[r] = Words4{0u, 0u, 0u, 0u};
      if (is_used && c < kValueDim) x[r] = load_16(sums + c);
    }
  }
  KVQUANT_DEVICE void add(const Words4 (&x)[Row::kRounds], float weight, bool is_copied,
                          Row& stored, Row& copied) const {
#pragma unroll
    for (int r = 0; r < Row::kRounds; ++r) {
      const float four[4] = {bits_float(x[r].x), bits_float(x[r].y), bits_float(x[r].z),
                             bits_float(x[r].w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = weight * four[i];
        stored.x[r][i] += partials.extra && is_copied ? 0.0f : product;
        copied.x[r][i] += partials.extra && is_copied ? product : 0.0f;
      }
    }
  }
  static KVQUANT_DEVICE void add_four(float (&to)[4], const Words4& x) {
    to[0] += bits_float(x.x);
    to[1] += bits_float(x.y);
    to[2] += bits_float(x.z);
    to[3] += bits_float(x.w);
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
    if (a.s_aux) {  // a learned sink: one more score, without a value
      SoftmaxState sink;
      sink.max = global_load(a.s_aux + head);
      sink.sum = 1.0f;
      ours = total.merge(sink).ours;
    }
    const float norm = ours * total.finish();
    uint8_t* const output = a.output + row * (kElementBytes * kValueDim);
#pragma unroll
    for (int r = 0; r < Row::kRounds; ++r) {
      const int c = Row::channel(r);
      if (c >= kValueDim) continue;
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = (stored.x[r][i] + copied.x[r][i]) * norm;
      if constexpr (kIsFloat32) {
        store_16(output + 4 * c,
                 {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])});
      } else {
        using Output = Dense16<kValueDim, kIsBFloat16>;
        global_store(reinterpret_cast<Words2*>(output + 2 * c),
                     Words2{pack<Output>(x[0], x[1]), pack<Output>(x[2], x[3])});
      }
    }
    if (lane_index() == 0) global_store(a.logsumexp + row, total.logsumexp());
  }
};

}  // namespace kvquant
