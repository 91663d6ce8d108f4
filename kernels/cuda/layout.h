// How query rows, columns and channels lie in the matrix products of a block. Lane 4g + t has
// elements e = 0 .. 3 of each product:
//
//   kRows 16   scores  queries x keys          row g + 8 (e / 2), column 2t + e % 2
//              output  weights x values        row g + 8 (e / 2), channel 2t + e % 2
//   kRows 8    scores  keys x queries          row 2t + e % 2, column g + 8 (e / 2)
//              output  values x weights        row 2t + e % 2, channel g + 8 (e / 2)
//
// Eight rows, for instance one new token of a model with 4 queries per KV head, would leave half of
// each product of 16 rows empty. Keys and values are then the left operands, which have 16 rows, and
// queries are the right ones, which have 8 columns: half as many products, weights and sums. The
// queries fit the registers; weights have to be transposed.
#pragma once

#include "cuda/specialisation.h"

namespace kvquant {

struct alignas(8) Floats2 {
  float x, y;
};

template <int kQueryRows>
struct Layout;

template <>
struct Layout<16> {
  static constexpr bool kHoldsQueries = false;
  static constexpr int kColumns = 8;                  // of a product of scores
  static constexpr int kQueryWords = 4;               // of a lane's operand
  static constexpr int kPairsOfProduct = 1;           // pairs of values in a product
  static constexpr int kFirstLane = 1, kEndLane = 4;  // lanes with other columns of the same rows

  static KVQUANT_DEVICE int row(int r) { return lane_index() / 4 + 8 * r; }
  static KVQUANT_DEVICE bool leads() { return lane_index() % 4 == 0; }
  static KVQUANT_FN constexpr int row_of(int e) { return e / 2; }
  static KVQUANT_FN constexpr int column_of(int e) { return e % 2; }
  // Column `column_of(e)` of this lane in product m.
  static KVQUANT_DEVICE int column(int m, int c) { return 8 * m + lane_index() % 4 * 2 + c; }
  // Where a column's scale is stored, so that a lane's two are neighbours.
  static KVQUANT_DEVICE int scale_place(int column) { return column; }
  // The lane with the weight of row(r) and a column of an operand.
  static KVQUANT_DEVICE int weight_lane(int, int column) {
    return lane_index() / 4 * 4 + column % 8 / 2;
  }
  static KVQUANT_FN constexpr int weight_word(int r, int half) { return r + 2 * half; }

  // first, second: two neighbouring pairs of eights of columns.
  template <class K, int kEights>
  static KVQUANT_DEVICE void add_scores(float (&sum)[4], const uint32_t (&query)[4],
                                        const uint32_t (&first)[kEights],
                                        const uint32_t (&second)[kEights], int m) {
    const uint32_t b[2] = {first[m], second[m]};
    multiply<K>(sum, query, b);
  }
  // sums: of two neighbouring pairs, `first` and `second`; k: sixteen columns.
  template <class V, int kEights>
  static KVQUANT_DEVICE void add_values(float (*sums)[4], const uint32_t (&weights)[4],
                                        const uint32_t (&first)[kEights],
                                        const uint32_t (&second)[kEights], int k) {
    const uint32_t b[2] = {first[2 * k], first[2 * k + 1]};
    multiply<V>(sums[0], weights, b);
    const uint32_t c[2] = {second[2 * k], second[2 * k + 1]};
    multiply<V>(sums[1], weights, c);
  }
  static KVQUANT_DEVICE void add_ones(float (&sum)[4], const uint32_t (&weights)[4]) {
    const uint32_t ones[2] = {0x3c003c00u, 0x3c003c00u};
    mma_m16n8k16_f16(sum, weights, ones);
  }
  static KVQUANT_DEVICE void add_points(float (&sum)[4], const uint32_t (&query)[4],
                                        const Words2& points) {
    const uint32_t b[2] = {points.x, points.y};
    mma_m16n8k16_f16(sum, query, b);
  }
  // The numbers of channels that belong to this lane's elements of product i: x to those with
  // column_of(e) == 0, y to the others. `numbers`: FP16, one for each channel of the values.
  template <class V>
  static KVQUANT_DEVICE Floats2 of_channels(SharedPtr<Words2> numbers, int i) {
    // Four neighbouring channels lie in two neighbouring pairs. In a chunk with half the channels,
    // lanes without channels read those of another lane.
    const int t = lane_index() % 4, pair = i / 2 * 2;
    const Words2 two = numbers[V::channel(pair, V::channel(pair, 7) < 0 ? t % 2 * 2 : 2 * t) / 4];
    return i % 2 ? Floats2{half_high(two.x), half_high(two.y)}
                 : Floats2{half_low(two.x), half_low(two.y)};
  }
  // Column c of a product of scores: the lane that has its score for row(r), and its element.
  static KVQUANT_DEVICE int score_lane(int c) { return lane_index() / 4 * 4 + c / 2; }
  static KVQUANT_FN constexpr int element_of(int r, int c) { return 2 * r + c % 2; }
  // w[k]: the operand of eight columns in float32; values: see float_values.h.
  template <int kProducts>
  static KVQUANT_DEVICE void float_weights(const float (&x)[kProducts][4],
                                           uint32_t (&w)[kProducts][4]) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[m][i] = float_bits(x[m][i % 2 * 2 + i / 2]);
    }
  }
  static KVQUANT_DEVICE void multiply_floats(float (&sums)[4], const uint32_t (&weights)[4],
                                             const uint32_t (&values)[2]) {
    multiply_float32(sums, weights, values);
  }
  // w[k]: the operand of sixteen columns, from the weights of products 2k and 2k + 1.
  template <class V, int kProducts>
  static KVQUANT_DEVICE void pack_weights(const float (&x)[kProducts][4],
                                          uint32_t (&w)[kProducts / 2][4]) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      w[m / 2][m % 2 * 2] = pack<V>(x[m][0], x[m][1]);
      w[m / 2][m % 2 * 2 + 1] = pack<V>(x[m][2], x[m][3]);
    }
  }
};

template <>
struct Layout<8> {
  static constexpr bool kHoldsQueries = true;
  static constexpr int kColumns = 16, kQueryWords = 2, kPairsOfProduct = 2;
  static constexpr int kFirstLane = 4, kEndLane = 32;

  static KVQUANT_DEVICE int row(int r) { return lane_index() % 4 * 2 + r; }
  static KVQUANT_DEVICE bool leads() { return lane_index() < 4; }
  static KVQUANT_FN constexpr int row_of(int e) { return e % 2; }
  static KVQUANT_FN constexpr int column_of(int e) { return e / 2; }
  static KVQUANT_DEVICE int column(int m, int c) { return 16 * m + lane_index() / 4 + 8 * c; }
  static KVQUANT_DEVICE int scale_place(int column) {
    return column / 16 * 16 + column % 8 * 2 + column / 8 % 2;
  }
  static KVQUANT_DEVICE int weight_lane(int r, int column) { return 4 * row(r) + column % 8 / 2; }
  static KVQUANT_FN constexpr int weight_word(int, int half) { return half; }

  template <class K, int kEights>
  static KVQUANT_DEVICE void add_scores(float (&sum)[4], const uint32_t (&query)[2],
                                        const uint32_t (&first)[kEights],
                                        const uint32_t (&second)[kEights], int m) {
    const uint32_t a[4] = {first[2 * m], first[2 * m + 1], second[2 * m], second[2 * m + 1]};
    multiply<K>(sum, a, query);
  }
  template <class V, int kEights>
  static KVQUANT_DEVICE void add_values(float (*sums)[4], const uint32_t (&weights)[2],
                                        const uint32_t (&first)[kEights],
                                        const uint32_t (&second)[kEights], int k) {
    const uint32_t a[4] = {first[2 * k], second[2 * k], first[2 * k + 1], second[2 * k + 1]};
    multiply<V>(sums[0], a, weights);
  }
  static KVQUANT_DEVICE void add_ones(float (&sum)[4], const uint32_t (&weights)[2]) {
    const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    mma_m16n8k16_f16(sum, ones, weights);
  }
  static KVQUANT_DEVICE void add_points(float (&sum)[4], const uint32_t (&query)[2],
                                        const Words2& points) {
    const uint32_t a[4] = {points.x, points.x, points.y, points.y};
    mma_m16n8k16_f16(sum, a, query);
  }
  template <class V>
  static KVQUANT_DEVICE Floats2 of_channels(SharedPtr<Words2> numbers, int i) {
    // Two neighbouring channels lie in two neighbouring pairs.
    const int g = lane_index() / 4, n = V::channel(2 * i, 7) < 0 ? g % 4 : g;
    const uint32_t two = shared_cast<uint32_t>(numbers)[V::channel(2 * i, n) / 2];
    return {half_low(two), half_high(two)};
  }
  static KVQUANT_DEVICE int score_lane(int c) { return c % 8 * 4 + lane_index() % 4; }
  static KVQUANT_FN constexpr int element_of(int r, int c) { return r + c / 8 * 2; }
  template <int kProducts>
  static KVQUANT_DEVICE void float_weights(const float (&x)[kProducts][4],
                                           uint32_t (&w)[2 * kProducts][2]) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      transpose_8x8_floats(x[m][0], x[m][1], w[2 * m]);
      transpose_8x8_floats(x[m][2], x[m][3], w[2 * m + 1]);
    }
  }
  static KVQUANT_DEVICE void multiply_floats(float (&sums)[4], const uint32_t (&weights)[2],
                                             const uint32_t (&values)[4]) {
    multiply_float32(sums, values, weights);
  }
  template <class V, int kProducts>
  static KVQUANT_DEVICE void pack_weights(const float (&x)[kProducts][4],
                                          uint32_t (&w)[kProducts][2]) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      w[m][0] = transpose_8x8(pack<V>(x[m][0], x[m][1]));
      w[m][1] = transpose_8x8(pack<V>(x[m][2], x[m][3]));
    }
  }
};

}  // namespace kvquant
