// The macros that a compilation is specialised by, as types and constants.
//
//   KVQUANT_DTYPE                      of queries, exact copies and output (KvquantDtype)
//   KVQUANT_HEAD_DIM, .._V_HEAD_DIM    channels of keys and of values
//   KVQUANT_K_FORMAT, .._K_GRID        KvquantFormat and KvquantGrid of the keys
//   KVQUANT_K_GROUP                    channels (token grid) or tokens (channel grid) of a scale
//   KVQUANT_K_ROTATE                   keys are rotated, so queries have to be
//   KVQUANT_V_FORMAT, .._GRID, .._GROUP, .._ROTATE   the same of the values
//   KVQUANT_SPLIT, .._UNIT, .._BLOCKS  columns of a block (Splits in partials.h)
//   KVQUANT_ROWS                       query rows of a block (layout.h)
#pragma once

#include "cuda/codecs.h"

namespace kvquant {

constexpr int kHeadDim = KVQUANT_HEAD_DIM, kValueDim = KVQUANT_V_HEAD_DIM;
// The channels of values whose sums a thread block has registers for, and the shares of a row. The
// blocks of a row's shares compute the same scores.
//
//   512 channels of values       0           128          256          384          512
//     blocks                     | block z   | block z + 1| block z + 2| block z + 3|
//
// In float32 there are registers for fewer: 256 channels have 4 shares, and 512 have 8.
constexpr bool kIsFloat32 = KVQUANT_DTYPE == kFloat32;
constexpr int kShareDim = kValueDim < (kIsFloat32 ? 256 : 512) ? kValueDim : kIsFloat32 ? 64 : 128;
constexpr int kShares = kValueDim / kShareDim;
constexpr int kMostColumns = KVQUANT_SPLIT, kUnit = KVQUANT_UNIT, kEnoughBlocks = KVQUANT_BLOCKS;
constexpr int kRows = KVQUANT_ROWS;
constexpr bool kIsBFloat16 = KVQUANT_DTYPE == kBFloat16;
constexpr int kElementBytes = kIsFloat32 ? 4 : 2;  // of queries, exact copies and output

static_assert(kRows == 8 || kRows == 16, "KVQUANT_ROWS: 8 or 16");
KVQUANT_FN constexpr bool is_head_dim(int dim) {
  return dim == 512 || (dim % 16 == 0 && dim <= 256);
}
static_assert(is_head_dim(kHeadDim) && is_head_dim(kValueDim),
              "head_dim: a multiple of 16 up to 256, or 512");
static_assert(kRows == 16 || (kHeadDim <= 256 && kValueDim <= 256),
              "KVQUANT_ROWS: 16 with a head_dim of 512; registers do not suffice for the queries");

KVQUANT_FN constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <bool kIsFirst, class First, class Second>
struct Choose {
  using Type = First;
};
template <class First, class Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// In float32, codes of the token grid are read without their offset (codecs.h).
template <class Codec>
using TokenGridCodec = typename Choose<kIsFloat32, Centred<Codec>, Codec>::Type;

template <int kFormat, int kGrid, int kDim>
struct CodecOf {
  using Type = typename Choose<kIsFloat32, Dense32<kDim>, Dense16<kDim, kIsBFloat16>>::Type;
};
template <int kDim>
struct CodecOf<kInt8, kTokenGrid, kDim> {
  using Type = TokenGridCodec<SignedBytes<kDim>>;
};
template <int kDim>
struct CodecOf<kInt8, kChannelGrid, kDim> {
  using Type = UnsignedBytes<kDim>;
};
template <int kGrid, int kDim>
struct CodecOf<kFp8, kGrid, kDim> {
  using Type = E4M3Bytes<kDim>;
};
template <int kDim>
struct CodecOf<kInt4, kTokenGrid, kDim> {
  using Type = TokenGridCodec<Nibbles<kDim>>;
};
template <int kDim>
struct CodecOf<kInt4, kChannelGrid, kDim> {
  using Type = Nibbles<kDim>;
};
template <int kDim>
struct CodecOf<kInt3, kTokenGrid, kDim> {
  using Type = TokenGridCodec<BitTriples<kDim>>;
};
template <int kDim>
struct CodecOf<kInt3, kChannelGrid, kDim> {
  using Type = BitTriples<kDim>;
};
template <int kDim>
struct CodecOf<kInt2, kTokenGrid, kDim> {
  using Type = TokenGridCodec<BitPairs<kDim>>;
};
template <int kDim>
struct CodecOf<kInt2, kChannelGrid, kDim> {
  using Type = BitPairs<kDim>;
};
// The terms of a query's, or a weight's, operand (float32.h). Products of floats split both.
template <class Codec>
constexpr int kTermsOf = kIsFloat32 && !Codec::kIsDense ? 2 : 1;

// How the keys, or the values, of one kind of column (columns.h) are stored: the codec, and the
// scales.
//   kGroup   channels of a scale (token grid) or tokens of a scale (channel grid); 0: no scales
//   kParts   shares of a stored row; the codec has the channels of one
template <class C, bool kOnChannelGrid, int kGroupLength, bool kIsRotated, int kShares = 1>
struct RowForm {
  using Codec = C;
  static constexpr bool kChannelGrid = kOnChannelGrid, kRotated = kIsRotated;
  static constexpr bool kScaled = kGroupLength != 0, kTokenScaled = kScaled && !kChannelGrid;
  static constexpr bool kHasZeroPoint = kChannelGrid && !kIsE4M3<C>;
  static constexpr int kGroup = kGroupLength, kParts = kShares;
  // Scales of a row of the token grid, and those that a share needs. A group has whole shares, or a
  // share has whole groups.
  static constexpr int kRowGroups = kTokenScaled ? C::kChannels * kParts / larger_of(kGroup, 1) : 0;
  static constexpr int kGroups = kRowGroups < kParts ? (kTokenScaled ? 1 : 0) : kRowGroups / kParts;
  static_assert(!kTokenScaled || C::kParts == 1 || kGroup % 64 == 0,
                "KVQUANT_K_GROUP, KVQUANT_V_GROUP: a multiple of 64 for codes of 2 or 3 bits");
};

using StoredKeys = RowForm<CodecOf<KVQUANT_K_FORMAT, KVQUANT_K_GRID, kHeadDim>::Type,
                           KVQUANT_K_GRID == kChannelGrid && KVQUANT_K_FORMAT != kDense,
                           KVQUANT_K_FORMAT == kDense ? 0 : KVQUANT_K_GROUP, KVQUANT_K_ROTATE != 0>;
using StoredValues =
    RowForm<CodecOf<KVQUANT_V_FORMAT, KVQUANT_V_GRID, kShareDim>::Type,
            KVQUANT_V_GRID == kChannelGrid && KVQUANT_V_FORMAT != kDense,
            KVQUANT_V_FORMAT == kDense ? 0 : KVQUANT_V_GROUP, KVQUANT_V_ROTATE != 0, kShares>;
using CopiedKeys = RowForm<CodecOf<kDense, kTokenGrid, kHeadDim>::Type, false, 0, false>;
using CopiedValues =
    RowForm<CodecOf<kDense, kTokenGrid, kShareDim>::Type, false, 0, false, kShares>;

}  // namespace kvquant
