// Error feedback on the channel grid: the channels of a block are rounded from the last to the first,
// and what the error of one costs is taken from the elements of those before it. hf_kvquant/quantization.py is
// the definition.
//
// The rows of the block are in shared memory, in float32. Eight or four channels are a panel; panel 0
// has the last ones. A warp rounds them for all tokens, a lane for every 32nd token, in registers;
// then all warps take the errors from the channels before the panel, a lane for every 32nd channel.
// So an element is read and written once for a panel's errors, and it loses them in the order in
// which channels are rounded. With 128 channels:
//
//   warp 0     | round panel 0 | take from .. 119 |               . | take from .. 111 |
//   warp 1     |             . | take from .. 119 | round panel 1   | take from .. 111 |
//   others     |             . | take from .. 119 |               . | take from .. 111 |
//   copies     | factors of panel 1 ------------> | factors of panel 2 --------------> |
//              ^ barrier       ^ barrier          ^ barrier         ^ barrier
#pragma once

#include "cuda/quantize.h"

namespace kvquant {

// What a code stands for before scale and zero point: the nearest value of the format to y, which is
// a result of Channel<Format>::code().
template <class Format>
KVQUANT_DEVICE float nearest(float y) {
  if constexpr (Format::kIsFloat) {
#if KVQUANT_ARCH >= 890
    return half_low(e4m3x2_low(pack_e4m3x2(y, 0.0f)));
#else
    return e4m3_to_float(float_to_e4m3(y));
#endif
  } else {
    return sub_rn(add_rn(y, kLastBitIsOne), kLastBitIsOne);
  }
}

template <class Format, int kHeadDim, int kLength>
struct Feedback {
  using R = Row<kHeadDim>;
  // A long block leaves a lane registers for fewer channels.
  static constexpr int kPanel = kLength > 64 ? 4 : 8, kPanels = kHeadDim / kPanel;
  static constexpr int kWarps = KVQUANT_THREADS / 32;
  static constexpr int kTokens = (kLength + 31) / 32;  // of a lane
  // Four floats between rows let eight lanes read 16 bytes of a row each at once.
  static constexpr int kStride = kHeadDim + 4;
  static constexpr int kErrorsAt = kLength * kStride, kFactorsAt = kErrorsAt + kLength * kPanel;
  static constexpr int kBytes = 4 * (kFactorsAt + 2 * kPanel * kHeadDim);
  static_assert(kBytes <= 99 << 10, "feedback: the block has to fit the shared memory of a GPU");

  SharedPtr<float> rows;  // `[kLength, kStride]`, in the end codes before rounding

  // The octets of token t that belong to this lane.
  KVQUANT_DEVICE void put(int t, const float (&y)[R::kPerLane][8]) const {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) write(rows + t * kStride + 8 * R::octet(i), y[i]);
  }
  KVQUANT_DEVICE void get(int t, float (&y)[R::kPerLane][8]) const {
#pragma unroll
    for (int i = 0; i < R::kPerLane; ++i) read(rows + t * kStride + 8 * R::octet(i), y[i]);
  }

  // Rounds the rows that all threads have put. `all`: the factors of this head, `[kHeadDim,
  // kHeadDim]`; `block` stores scales and knows which of its tokens are padding. All threads of the
  // block of threads call this, and may get codes afterwards.
  template <class Block>
  KVQUANT_DEVICE void round(const float* all, const Block& block) const {
    uint32_t counted = 0;  // bit k: token lane + 32 k determines scales
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int t = lane_index() + 32 * k;
      if (t < kLength && !block.is_padding(t)) counted |= 1u << k;
    }
    copy_factors(all, 0);
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      cp_async_wait<0>();
      block_barrier();
      if (panel + 1 < kPanels) copy_factors(all, panel + 1);
      if (warp_index() == panel % kWarps) round_panel(panel, counted, block);
      block_barrier();
      take_errors(panel);
    }
  }

 private:
  static KVQUANT_DEVICE int first_of(int panel) { return kHeadDim - (panel + 1) * kPanel; }
  KVQUANT_DEVICE SharedPtr<float> errors(int t) const { return rows + kErrorsAt + t * kPanel; }
  // Row i of the factors of a panel. Two panels have room, one after the other.
  KVQUANT_DEVICE SharedPtr<float> factors(int panel, int i) const {
    return rows + kFactorsAt + (panel % 2 * kPanel + i) * kHeadDim;
  }

  // Begins to copy what the factors of a panel take from its own channels and those before it.
  KVQUANT_DEVICE void copy_factors(const float* all, int panel) const {
#pragma unroll 1
    for (int i = warp_index(); i < kPanel; i += kWarps) {
      const float* row = all + (first_of(panel) + i) * kHeadDim;
      for (int j = 4 * lane_index(); j < first_of(panel) + kPanel; j += 4 * 32) {
        cp_async_16(factors(panel, i) + j, row + j);
      }
    }
    cp_async_commit();
  }

  // A warp calls this.
  template <class Block>
  KVQUANT_DEVICE void round_panel(int panel, uint32_t counted, const Block& block) const {
    constexpr bool kSymmetric = Channel<Format>::kSymmetric;
    const int first = first_of(panel);
    float y[kTokens][kPanel] = {};  // elements, then errors
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int t = lane_index() + 32 * k;
      if (t < kLength) read(rows + t * kStride + first, y[k]);
    }
#pragma unroll
    for (int i = kPanel - 1; i >= 0; --i) {
      Channel<Format> channel;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (counted >> k & 1 && is_finite(fabsf(y[k][i]))) channel.count(y[k][i]);
      }
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) {
        const float low = kSymmetric ? 0.0f : shuffle_xor(channel.low, mask);
        channel.merge(low, shuffle_xor(channel.high, mask));
      }
      const uint16_t z = kSymmetric ? 0 : channel.zero_point();
      const float zero = half_of(z);
      const uint16_t s = channel.scale(zero);
      const float scale = half_of(s), r = Channel<Format>::reciprocal(s);
      if (lane_index() == 0) block.store_scale(first + i, s, z);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const int t = lane_index() + 32 * k;
        const float code = Channel<Format>::code(y[k][i], zero, r);
        const float product = mul_rn(nearest<Format>(code), scale);
        const float error = sub_rn(y[k][i], kSymmetric ? product : add_rn(zero, product));
        if (t < kLength) rows[t * kStride + first + i] = code;
        y[k][i] = is_finite(fabsf(error)) ? error : 0.0f;
#pragma unroll
        for (int j = 0; j < i; ++j) {
          const float factor = factors(panel, i)[first + j];
          y[k][j] = sub_rn(y[k][j], mul_rn(factor, y[k][i]));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int t = lane_index() + 32 * k;
      if (t < kLength) write(errors(t), y[k]);
    }
  }

  // From the channels before a panel.
  KVQUANT_DEVICE void take_errors(int panel) const {
#pragma unroll 1
    for (int j = lane_index(); j < first_of(panel); j += 32) {
      float factor[kPanel];
#pragma unroll
      for (int i = 0; i < kPanel; ++i) factor[i] = factors(panel, i)[j];
#pragma unroll 4
      for (int t = warp_index(); t < kLength; t += kWarps) {
        float error[kPanel], x = rows[t * kStride + j];
        read(errors(t), error);
#pragma unroll
        for (int i = kPanel - 1; i >= 0; --i) x = sub_rn(x, mul_rn(factor[i], error[i]));
        rows[t * kStride + j] = x;
      }
    }
  }

  template <int n>
  static KVQUANT_DEVICE void write(SharedPtr<float> to, const float (&y)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      shared_cast<Words4>(to + i)[0] = Words4{float_bits(y[i]), float_bits(y[i + 1]),
                                              float_bits(y[i + 2]), float_bits(y[i + 3])};
    }
  }
  template <int n>
  static KVQUANT_DEVICE void read(SharedPtr<float> from, float (&y)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const Words4 w = shared_cast<Words4>(from + i)[0];
      y[i] = bits_float(w.x);
      y[i + 1] = bits_float(w.y);
      y[i + 2] = bits_float(w.z);
      y[i + 3] = bits_float(w.w);
    }
  }
};

}  // namespace kvquant
