// Masks: which columns the rows of a block see, and the biases added to their scores.
//
// If the mask is the same for all rows (padding, or one that repeats over heads and queries), one
// lane finds the bit of a column for all of them. It is read row by row only where rows differ.
#pragma once

#include "cuda/columns.h"

namespace kvquant {

KVQUANT_DEVICE float mask_number(const uint8_t* p, int64_t kind) {
  if (kind == kAddFloat32) return global_load(reinterpret_cast<const float*>(p));
  const uint16_t bits = global_load(reinterpret_cast<const uint16_t*>(p));
  return kind == kAddFloat16 ? half_low(bits) : bfloat16_low(bits);
}

struct Seen {
  bool seen;
  float bias;
};

// One row of a mask at one column.
KVQUANT_DEVICE Seen mask_at(const KvquantAttention& a, const uint8_t* row, int column) {
  if (a.mask_kind == kNoMask) return {true, 0.0f};
  const uint8_t* p = row + column * a.mask_stride[3];
  if (a.mask_kind >= kAddFloat32) {
    const float bias = mask_number(p, a.mask_kind);
    return {!(bias <= mask_limit(a.mask_kind)), bias};
  }
  if (a.mask_kind == kBoolMask || a.mask_width == 1) return {global_load(p) != 0, 0.0f};
  if (a.mask_width == 4) {
    return {global_load(reinterpret_cast<const int32_t*>(p)) != 0, 0.0f};
  }
  return {global_load(reinterpret_cast<const int64_t*>(p)) != 0, 0.0f};
}

// Which of the columns `first` + 32 i, i < kCount, have no effect on scores: bit i. T: unsigned, as
// wide as the mask's elements. The loads do not wait for each other.
template <class T, int kCount>
KVQUANT_DEVICE uint32_t plain_columns(const KvquantAttention& a, const uint8_t* row, int first,
                                      int end) {
  const bool adds = a.mask_kind >= kAddFloat32;
  T x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = first + 32 * i;
    x[i] = adds;  // not plain
    if (column < end) {
      x[i] = global_load(reinterpret_cast<const T*>(row + column * a.mask_stride[3]));
    }
  }
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool plain = adds ? T(x[i] << 1) == 0 : x[i] != 0;  // a bias of 0 or -0
    found |= uint32_t(plain) << i;
  }
  return found;
}

struct Mask {
  const Place& p;
  bool is_shared;  // the mask is the same for all rows
  int plain_end;   // before this column causal order hides nothing, and no row reads copies

  KVQUANT_DEVICE explicit Mask(const Place& p) : p(p) {
    const KvquantAttention& a = p.a;
    is_shared = a.mask_kind <= kPaddingMask ||
                (a.mask_stride[1] == 0 && (a.q_len == 1 || a.mask_stride[2] == 0));
    const int first = p.first_position();
    plain_end = Copies::of<StoredKeys>(a.keys, p).dense_from(first, p.kv_len);
    const int v_from = Copies::of<StoredValues>(a.values, p).dense_from(first, p.kv_len);
    if (v_from < plain_end) plain_end = v_from;
    if (is_causal() && first + 1 < plain_end) plain_end = first + 1;
  }
  KVQUANT_DEVICE bool is_causal() const { return p.a.mask_kind <= kPaddingMask; }
  KVQUANT_DEVICE const uint8_t* row(int head, int query) const {
    const KvquantAttention& a = p.a;
    return a.mask + p.batch() * a.mask_stride[0] + head * a.mask_stride[1] +
           query * a.mask_stride[2];
  }
  // The part of the mask at `column` that holds for all rows of all heads.
  KVQUANT_DEVICE Seen common(int column) const {
    if (!is_shared || p.a.mask_kind == kNoMask) return {true, 0.0f};
    return mask_at(p.a, row(0, 0), column);
  }
  // Bit i: column `first` + 32 i is before `end`, and the mask, which is shared, leaves all scores
  // with it as they are.
  template <int kCount>
  KVQUANT_DEVICE uint32_t plain(int first, int end) const {
    const KvquantAttention& a = p.a;
    if (a.mask_kind == kNoMask) {
      uint32_t found = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) found |= uint32_t(first + 32 * i < end) << i;
      return found;
    }
    const uint8_t* from = row(0, 0);
    const int width = a.mask_kind == kAddFloat32    ? 4
                      : a.mask_kind >= kAddFloat16  ? 2
                      : a.mask_kind == kPaddingMask ? int(a.mask_width)
                                                    : 1;
    return width == 1   ? plain_columns<uint8_t, kCount>(a, from, first, end)
           : width == 2 ? plain_columns<uint16_t, kCount>(a, from, first, end)
           : width == 4 ? plain_columns<uint32_t, kCount>(a, from, first, end)
                        : plain_columns<uint64_t, kCount>(a, from, first, end);
  }
};

// Which columns of one kind (columns.h) one row of the block sees.
struct RowMask {
  const Mask& mask;
  const uint8_t* row = nullptr;
  int position, k_from, v_from;

  KVQUANT_DEVICE RowMask(const Mask& mask, const QueryRows& rows, int r) : mask(mask) {
    const Place& p = mask.p;
    position = p.first_position() + rows.query(r);
    k_from = Copies::of<StoredKeys>(p.a.keys, p).dense_from(position, p.kv_len);
    v_from = Copies::of<StoredValues>(p.a.values, p).dense_from(position, p.kv_len);
    if (p.a.mask_kind != kNoMask) row = mask.row(rows.head(r), rows.query(r));
  }
  KVQUANT_DEVICE Seen at(int column, bool is_sink, bool copied_keys, bool copied_values) const {
    const bool k_copied =
        (is_sink && Copies::has_sinks<StoredKeys>(mask.p.a.keys)) || column >= k_from;
    const bool v_copied =
        (is_sink && Copies::has_sinks<StoredValues>(mask.p.a.values)) || column >= v_from;
    const bool ordered = !mask.is_causal() || column <= position;
    if (column < 0 || !ordered || k_copied != copied_keys || v_copied != copied_values) {
      return {false, 0.0f};
    }
    return mask_at(mask.p.a, row, column);
  }
};

}  // namespace kvquant
