// How stored bytes become operands of a dot product.
#pragma once

#include "cpu/dot_avx512.h"

namespace kvquant {
inline namespace KVQUANT_ISA {

// Keys: `expand` makes kOut vectors of one. They are codes from 0 on, their numbers (kTimes * dot -
// kOffset * sum of weights) / kTimes.
template <class Format, bool kCentered, int kBytes>
struct KeyOperand {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 1, kTimes = 1, kOffset = kCentered ? 128 : 0;
  void expand(Quads x, Quads* out) const { out[0] = kCentered ? x ^ Quads(128) : x; }
};
template <bool kCentered, int kBytes>
struct KeyOperand<Nibble, kCentered, kBytes> {
  using Dot = IntDot<kBytes, true>;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 2, kTimes = kCentered ? 2 : 1, kOffset = kCentered ? 15 : 0;
  void expand(Quads x, Quads* out) const {
    out[0] = x.low_nibbles();
    out[1] = x.high_nibbles();
  }
};
struct PairedKeys {
  using Dot = PairDot;
  static constexpr bool kNibbles = true;
  static constexpr int kOut = 1, kTimes = 2, kOffset = 15;
  void expand(Quads x, PairDot::Codes* out) const { out[0] = x; }
};
// Values are taken in steps of kColumns columns, of which step s takes those from first(s)
// on, and in kHalves parts: `take` reads one of the four vectors of a step, `expand` makes kOut of
// each after bytes were interleaved. The numbers are dot * kUnit + kHalf * sum of weights.
//
// Bytes are signed, their weights are not.
template <class Dot_>
struct FourColumns {
  using Dot = Dot_;
  static constexpr int kColumns = 4, kHalves = 1, kOut = 1;
  static constexpr float kUnit = 1.0f, kHalf = 0.0f;
  static int first(int step) { return 4 * step; }
  template <int>
  static Quads take(const uint8_t* column, int64_t, int bytes) {
    return Quads::load_first(column, bytes);
  }
};
template <class Format, int kBytes>
struct ValueOperand : FourColumns<IntDot<kBytes, false>> {
  template <int>
  void expand(Quads x, Quads* out) const {
    out[0] = x;
  }
};
template <int kBytes>
struct ValueOperand<Nibble, kBytes> : FourColumns<IntDot<kBytes, false>> {
  static constexpr int kHalves = 2;
  static constexpr float kUnit = 0.0625f, kHalf = 0.5f;
  template <int kPart>
  void expand(Quads x, Quads* out) const {
    out[0] = kPart ? x.high_centered() : x.low_centered();
  }
};
struct PairedValues {
  using Dot = PairDot;
  static constexpr int kColumns = 8, kHalves = 2, kOut = 1;
  static constexpr float kUnit = 1.0f, kHalf = -7.5f;
  static int first(int step) { return step / 4 * 32 + step % 4 * 4; }
  template <int kPart>
  static Quads take(const uint8_t* column, int64_t row_bytes, int bytes) {
    const Quads a = Quads::load_first(column, bytes);
    const Quads b = Quads::load_first(column + 16 * row_bytes, bytes);
    return kPart ? Quads::pair_high(a, b) : Quads::pair_low(a, b);
  }
  template <int>
  void expand(Quads x, PairDot::Codes* out) const {
    out[0] = x;
  }
};
#ifdef __AVX512BF16__
template <int kPasses>
struct E4M3Operand : FourColumns<Bf16Dot<kPasses>> {
  static constexpr bool kNibbles = false;
  static constexpr int kOut = 2, kTimes = 1, kOffset = 0;
  const E4M3ToBf16 table;
  template <int = 0>
  void expand(Quads x, Quads* out) const {
    table.expand(x, out);
  }
};
#endif

}  // namespace KVQUANT_ISA
}  // namespace kvquant
