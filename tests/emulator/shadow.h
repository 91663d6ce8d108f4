// The emulator's record of every byte of memory that a launch may write: which thread wrote it,
// which thread read it, and since which barriers. Two accesses of one byte by different threads,
// at least one of them a write, are ordered by a block barrier between them, or within a warp by a
// warp barrier; otherwise they race.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kvquant::emulator {

// A thread that accesses memory, and the barriers that it has passed.
struct Actor {
  uint32_t block;  // number of the block in the launch, from 1
  uint32_t epoch;  // block barriers that it has passed
  uint32_t warp_epoch;
  uint16_t thread;

  uint16_t warp() const { return thread / 32; }
};

enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite };

struct Byte {
  Actor writer;           // block 0: nobody yet
  Actor reader;           // the last one
  uint32_t reader_lanes;  // of reader's warp, since its warp_epoch
  uint16_t other_reader;  // a reader in another warp of the same block since reader.epoch, + 1
  bool other_block_read;  // .. in another block
  bool in_flight;         // a cp.async of writer has not been waited for
  bool written_atomically;
};

// The reason why the access is a fault, with the other thread in `who`; or null, and the access is
// recorded.
const char* examine(Byte& byte, Access access, const Actor& actor, Actor& who);

}  // namespace kvquant::emulator
