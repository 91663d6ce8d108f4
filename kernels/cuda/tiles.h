// Tiles of stored rows: from global memory to shared memory, and from there to a lane's words.
//
// A tile is kTile rows (columns of the cache), a whole number of chunks each, kRowStride apart. One
// warp copies, and reads what it copied.
#pragma once

#include "cuda/columns.h"

namespace kvquant {

// Where the rows of one head are: stored by column, or copied.
struct StoredRows {
  const uint8_t* data;
  int row_bytes;

  template <class Stored>
  static KVQUANT_DEVICE StoredRows of(const KvquantSide& side, const Place& p) {
    return {p.of_head(side.data, side.data_stride), Stored::Codec::kRowBytes};
  }
  KVQUANT_DEVICE const uint8_t* row(int column, int) const {
    return data + int64_t(column) * row_bytes;
  }
};

template <class Codec, int kTile>
struct Tile {
  // Rows of 40 or 56 bytes begin at multiples of 8.
  static constexpr int kPiece = Codec::kRowBytes % 16 ? 8 : 16;
  static constexpr int kPieces = 16 * kChunks<Codec> / kPiece, kRowsAtOnce = 32 / kPieces;
  static constexpr int kStride = kRowStride<Codec>, kBytes = kTile * kStride;
  static_assert(kPieces <= 32, "a row is copied by one warp at once");

  // Entries first .. first + kTile; those that are not taken become zeros. kInOrder: entries are
  // consecutive columns, all stored.
  template <bool kInOrder, class Rows>
  static KVQUANT_DEVICE void copy(SharedPtr<uint8_t> to, const Rows& rows, const Columns& columns,
                                  int first) {
    const int lane = lane_index(), piece = lane % kPieces * kPiece, row0 = lane / kPieces;
    if (row0 >= kRowsAtOnce) return;
    const bool in_row = Codec::kRowBytes % 16 == 0 || piece < Codec::kRowBytes;
    const uint8_t* from = nullptr;
    if constexpr (kInOrder) from = rows.row(columns.begin + first + row0, -1) + piece;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const int row = row0 + i;
      if (kTile % kRowsAtOnce && row >= kTile) break;
      bool valid = in_row;
      if constexpr (kInOrder) {
        valid &= first + row < columns.count;
      } else {
        const int column = columns.column(first + row);
        from = column < 0 ? nullptr : rows.row(column, columns.slot(first + row));
        valid &= from != nullptr;
        if (valid) from += piece;
      }
      const SharedPtr<uint8_t> place = to + (row * kStride + piece);
      const uint8_t* source = kInOrder ? from + i * Codec::kRowBytes : from;
      if constexpr (kPiece == 16) {
        cp_async_16(place, source, valid);
      } else {
        cp_async_8(place, source, valid);
      }
    }
  }

  // Words of kAtOnce chunks from `chunk` on: of chunk j and the 8 rows from 8 m on, words[j * kTile
  // / 8 + m]. Chunks beyond the row repeat the last one.
  static constexpr int kAtOnce = 32 / kTile;
  template <bool kTransposed>
  static KVQUANT_DEVICE void load(SharedPtr<uint8_t> tile, int chunk, uint32_t (&words)[4]) {
    const int lane = lane_index();
    int mine = chunk + lane / kTile;
    if (kChunks<Codec> % kAtOnce && mine >= kChunks<Codec>) mine = kChunks<Codec> - 1;
    const SharedPtr<uint8_t> row = tile + (lane % kTile * kStride + 16 * mine);
    if constexpr (kTransposed) {
      ldmatrix_x4_trans(words, row);
    } else {
      ldmatrix_x4(words, row);
    }
  }
};

}  // namespace kvquant
