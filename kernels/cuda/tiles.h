// Tiles of stored rows: copied from global to shared memory, and loaded from there into registers.
//
// A tile is the rows of kTile columns of the cache, padded to whole chunks and kRowStride apart.
// The warp that copies a tile is the one that reads it.
#pragma once

#include "cuda/columns.h"

namespace kvquant {

// The stored rows of one head, column by column.
struct StoredRows {
  const KvquantSide& side;
  const Place& p;
  const uint8_t* data;   // of column 0, without pages
  int share, row_bytes;  // share: where this block's begins in a row

  template <class Stored>
  static KVQUANT_DEVICE StoredRows of(const KvquantSide& side, const Place& p) {
    constexpr int kShareBytes = Stored::Codec::kRowBytes;
    return {side, p, kPaged ? nullptr : p.of_column(side.data, side.data_stride, 0),
            p.part<Stored>() * kShareBytes, kShareBytes * Stored::kParts};
  }
  KVQUANT_DEVICE const uint8_t* row(int column, int) const {
    const uint8_t* const first = kPaged ? p.of_column(side.data, side.data_stride, column) : data;
    return first + (int64_t(in_storage(column)) * row_bytes + share);
  }
};

// kParts: shares of a row in global memory, of which the tile has one.
template <class Codec, int kTile, int kParts = 1>
struct Tile {
  // Rows of 40 or 56 bytes begin at multiples of 8.
  static constexpr int kPiece = Codec::kRowBytes % 16 ? 8 : 16;
  static constexpr int kAll = 16 * kChunks<Codec> / kPiece, kRounds = (kAll + 31) / 32,
                       kPieces = kAll / kRounds, kRowsAtOnce = 32 / kPieces;
  static constexpr int kStride = kRowStride<Codec>, kBytes = kTile * kStride;
  static_assert(kAll % kRounds == 0, "a row is copied by one warp at once, or in whole rounds");

  // A lane copies the same piece of each row that is kRowsAtOnce after its first.
  static KVQUANT_DEVICE int piece() { return lane_index() % kPieces * kPiece; }
  static KVQUANT_DEVICE int first_row() { return lane_index() / kPieces; }

  // Where this lane's first piece of a tile is whose first column is `column`; the next tile's is
  // kTileBytes further.
  static constexpr int kPitch = Codec::kRowBytes * kParts, kTileBytes = kTile * kPitch;
  template <class Rows>
  static KVQUANT_DEVICE const uint8_t* place(const Rows& rows, int column) {
    return rows.row(column + first_row(), -1) + piece();
  }
  // Copies a tile from its place; rows from `left` on are zeros.
  static KVQUANT_DEVICE void copy(SharedPtr<uint8_t> to, const uint8_t* from, int left) {
    const int row0 = first_row();
    if (row0 >= kRowsAtOnce) return;
    const SharedPtr<uint8_t> mine = to + (row0 * kStride + piece());
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      if (!is_row(row0 + i)) continue;
      copy_pieces(mine + i * kStride, from + i * kPitch, row0 + i < left);
    }
  }
  // Copies the rows of entries first .. first + kTile of a list; entries beyond the end are zeros.
  template <class Rows, class TheColumns>
  static KVQUANT_DEVICE void copy_list(SharedPtr<uint8_t> to, const Rows& rows,
                                       const TheColumns& columns, int first) {
    const int row0 = first_row();
    if (row0 >= kRowsAtOnce) return;
    const SharedPtr<uint8_t> mine = to + (row0 * kStride + piece());
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const int column = columns.column(first + row0 + i), slot = columns.slot(first + row0 + i);
      const uint8_t* from = column < 0 ? nullptr : rows.row(column, slot);
      const bool valid = from != nullptr;
      if (is_row(row0 + i)) copy_pieces(mine + i * kStride, valid ? from + piece() : from, valid);
    }
  }

  // Loads words of kAtOnce chunks from `chunk` on: words[j * kTile / 8 + m] is of chunk `chunk` + j
  // and the rows 8 m .. 8 m + 7. Chunks beyond the row repeat the last one.
  static constexpr int kAtOnce = 32 / kTile;
  template <bool kTransposed>
  static KVQUANT_DEVICE void load(SharedPtr<uint8_t> tile, int chunk, uint32_t (&words)[4]) {
    const int lane = lane_index();
    int place = lane % kTile * kStride + lane / kTile * 16;
    if (kChunks<Codec> % kAtOnce && chunk + lane / kTile >= kChunks<Codec>) {
      place = lane % kTile * kStride + 16 * (kChunks<Codec> - 1 - chunk);
    }
    const SharedPtr<uint8_t> row = tile + place + 16 * chunk;
    if constexpr (kTransposed) {
      ldmatrix_x4_trans(words, row);
    } else {
      ldmatrix_x4(words, row);
    }
  }

 private:
  static constexpr int kRowBytes = Codec::kRowBytes;
  static KVQUANT_DEVICE bool is_row(int row) { return kTile % kRowsAtOnce == 0 || row < kTile; }
  // This lane's pieces of a row, one for each round.
  static KVQUANT_DEVICE void copy_pieces(SharedPtr<uint8_t> to, const uint8_t* from, bool valid) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int further = r * kPieces * kPiece;
      if constexpr (kPiece == 16) {
        cp_async_16(to + further, valid ? from + further : from, valid);
      } else {
        cp_async_8(to + further, from + further, valid && piece() + further < kRowBytes);
      }
    }
  }
};

}  // namespace kvquant
