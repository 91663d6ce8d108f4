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
  int share, row_bytes;  // share: where this block's begins in a row, or in the first plane

  template <class Stored>
  static KVQUANT_DEVICE StoredRows of(const KvquantSide& side, const Place& p) {
    constexpr int kShareBytes = Stored::Codec::kRowBytes;
    return {side, p, kPaged ? nullptr : p.of_column(side.data, side.data_stride, 0),
            p.part<Stored>() * kFirstPlane<typename Stored::Codec>, kShareBytes * Stored::kParts};
  }
  KVQUANT_DEVICE const uint8_t* row(int column, int) const {
    const uint8_t* const first = kPaged ? p.of_column(side.data, side.data_stride, column) : data;
    return first + (int64_t(in_storage(column)) * row_bytes + share);
  }
};

// kParts: shares of a row in global memory, of which the tile has one.
template <class Codec, int kTile, int kParts = 1>
struct Tile {
  static constexpr int kEights = kTile / 8;
  // Rows of 40 or 56 bytes begin at multiples of 8.
  static constexpr int kPiece = Codec::kRowBytes % 16 ? 8 : 16;
  static constexpr int kAll = 16 * kRowChunks<Codec> / kPiece, kRounds = (kAll + 31) / 32,
                       kPieces = kAll / kRounds, kRowsAtOnce = 32 / kPieces;
  static constexpr int kStride = kRowStride<Codec>, kBytes = kTile * kStride;
  static_assert(kAll % kRounds == 0, "a row is copied by one warp at once, or in whole rounds");

  // A lane copies the same piece of each row that is kRowsAtOnce after its first.
  static KVQUANT_DEVICE int piece() { return lane_index() % kPieces * kPiece; }
  static KVQUANT_DEVICE int first_row() { return lane_index() / kPieces; }
  // Where it lies in a stored row, behind the first byte of the share.
  //
  //   row     low bits of share 0 | .. of share 1 | high bits of share 0 | .. of share 1
  //   tile    low bits | high bits, of one share
  static KVQUANT_DEVICE int stored_piece() {
    if constexpr (kHasHighBits<Codec> && kParts > 1) {
      constexpr int kLow = kFirstPlane<Codec>, kHigh = kRowBytes - kLow;
      static_assert(kRounds == 1, "a lane copies one piece of a share");
      return piece() + (piece() < kLow ? 0 : (kParts - 1) * kLow - Place::share() * (kLow - kHigh));
    }
    return piece();
  }

  // Where this lane's first piece of a tile is whose first column is `column`; the next tile's is
  // kTileBytes further.
  static constexpr int kPitch = Codec::kRowBytes * kParts, kTileBytes = kTile * kPitch;
  template <class Rows>
  static KVQUANT_DEVICE const uint8_t* place(const Rows& rows, int column) {
    return rows.row(column + first_row(), -1) + stored_piece();
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
      if (is_row(row0 + i))
        copy_pieces(mine + i * kStride, valid ? from + stored_piece() : from, valid);
    }
  }

  // Loads words of kAtOnce chunks from `chunk` on: words[j * kTile / 8 + m] is of chunk `chunk` + j
  // and the rows 8 m .. 8 m + 7. Chunks beyond the row repeat the last one.
  static constexpr int kAtOnce = 32 / kTile;
  template <bool kTransposed>
  static KVQUANT_DEVICE void load(SharedPtr<uint8_t> tile, int chunk,
                                  typename Codec::Word (&words)[4]) {
    if constexpr (kHasHighBits<Codec>) {
      uint32_t low[4], high[4];
      load_chunks<kTransposed>(tile, chunk, low);
      load_high_bits<kTransposed>(tile + kFirstPlane<Codec>, chunk, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = {low[i], high[i]};
    } else {
      load_chunks<kTransposed>(tile, chunk, words);
    }
  }

 private:
  static constexpr int kRowBytes = Codec::kRowBytes;
  template <bool kTransposed>
  static KVQUANT_DEVICE void load_chunks(SharedPtr<uint8_t> tile, int chunk, uint32_t (&words)[4]) {
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
  // The high bits of the channels whose low bits load_chunks() gives, where split() wants them.
  //
  //   low bits    16 bytes of a chunk    a a a a  b b b b  c c c c  d d d d
  //   high bits   8 bytes of it          a, b     c, d
  //
  // The high bits of b are one bit further left than those of a in the same four bytes.
  template <bool kTransposed>
  static KVQUANT_DEVICE void load_high_bits(SharedPtr<uint8_t> high, int chunk,
                                            uint32_t (&words)[4]) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    if constexpr (kTransposed) {
      // A lane's bytes are in another lane's word, because a chunk has the high bits of two chunks.
      uint32_t all[4];
      ldmatrix_x4_trans(all, high + (lane % kTile * kStride + chunk / 2 * 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = (chunk + i * 8 / kTile) % 2;
        words[i] =
            shuffle(all[i * 8 % kTile / 8], 16 * half + g / 4 * 8 + g % 2 * 4 + t) >> g / 2 % 2;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int of_tile = i * 8 / kTile, last = kChunks<Codec> - 1;
        const int here = chunk + of_tile < last ? chunk + of_tile : last;
        const auto row = shared_cast<uint32_t>(high + ((8 * i % kTile + g) * kStride + 8 * here));
        const uint32_t word = row[t / 2];
        words[i] = word >> t % 2;
      }
    }
  }
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

// The chunks whose pairs make whole steps.
template <class Codec>
constexpr int kChunksOfStep = Codec::kPairsOfWord == 1 ? 2 : 1;

// The words of kAtOnce chunks of a tile, and their pairs.
template <class Codec, class TheTile>
struct Chunks {
  static constexpr int kAtOnce = larger_of(kChunksOfStep<Codec>, TheTile::kAtOnce);
  static constexpr int kEights = TheTile::kEights, kParts = Codec::kParts;
  // The pairs that split() makes at once: of all chunks, or of a part of one.
  static constexpr int kHere = kParts > 1 ? 1 : kAtOnce, kPairs = kHere * Codec::kPairsOfWord;
  static constexpr int kSplits = kAtOnce / kHere * kParts;

  typename Codec::Word words[kAtOnce][kEights];

  template <bool kTransposed>
  KVQUANT_DEVICE void load(SharedPtr<uint8_t> tile, int chunk) {
#pragma unroll
    for (int l = 0; l < kAtOnce; l += TheTile::kAtOnce) {
      typename Codec::Word four[4];
      TheTile::template load<kTransposed>(tile, chunk + l, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[l + i / kEights][i % kEights] = four[i];
    }
  }
  // The pairs of split i of kSplits, from that number on which first_pair() says.
  template <class SplitCodec, bool kAllSeen>
  KVQUANT_DEVICE void split(int i, uint32_t (&pairs)[kPairs][kEights]) const {
#pragma unroll
    for (int l = 0; l < kHere; ++l) {
#pragma unroll
      for (int m = 0; m < kEights; ++m) {
        uint32_t some[Codec::kPairsOfWord];
        kvquant::split<SplitCodec, kAllSeen>(words[i / kParts * kHere + l][m], i % kParts, some);
#pragma unroll
        for (int j = 0; j < Codec::kPairsOfWord; ++j) {
          pairs[l * Codec::kPairsOfWord + j][m] = some[j];
        }
      }
    }
  }
  static KVQUANT_DEVICE int first_pair(int chunk, int i) {
    return chunk * (kParts * Codec::kPairsOfWord) + i * kPairs;
  }
};

}  // namespace kvquant
