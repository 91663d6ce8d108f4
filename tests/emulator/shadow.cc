#include "shadow.h"

namespace kvquant::emulator {
namespace {

bool ordered(const Actor& before, const Actor& now) {
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.epoch != now.epoch) return true;
  return before.warp() == now.warp() && before.warp_epoch != now.warp_epoch;
}

void note_reader(Byte& byte, const Actor& actor) {
  const uint32_t lane = 1u << actor.thread % 32;
  const Actor& last = byte.reader;
  if (last.block == actor.block && last.epoch == actor.epoch) {
    if (last.warp() != actor.warp()) {
      byte.other_reader = last.thread + 1;
      byte.reader_lanes = 0;
    } else if (last.warp_epoch != actor.warp_epoch) {
      byte.reader_lanes = 0;
    }
  } else {
    if (last.block != 0 && last.block != actor.block) byte.other_block_read = true;
    byte.other_reader = 0;
    byte.reader_lanes = 0;
  }
  byte.reader = actor;
  byte.reader_lanes |= lane;
}

// A reader whom a write of `actor` would race with.
bool racing_reader(const Byte& byte, const Actor& actor, Actor& who) {
  who = byte.reader;
  if (who.block == 0) return false;
  if (who.block != actor.block || byte.other_block_read) return true;
  if (who.epoch != actor.epoch) return false;
  if (who.warp() != actor.warp()) return true;
  if (byte.other_reader) {
    who.thread = byte.other_reader - 1;
    if (who.warp() != actor.warp()) return true;
  }
  const uint32_t lanes = byte.reader_lanes & ~(1u << actor.thread % 32);
  if (lanes == 0 || byte.reader.warp_epoch != actor.warp_epoch) return false;
  who.thread = uint16_t(actor.warp() * 32 + __builtin_ctz(lanes));
  return true;
}

}  // namespace

const char* examine(Byte& byte, Access access, const Actor& actor, Actor& who) {
  who = byte.writer;
  if (byte.in_flight && byte.writer.block == actor.block) {
    return "a cp_async that nobody waited for still copies there";
  }
  const bool atomic = access == Access::kAtomicRead || access == Access::kAtomicWrite;
  const bool write = access == Access::kWrite || access == Access::kAtomicWrite;
  if (byte.writer.block != 0 && !(atomic && byte.written_atomically) &&
      !ordered(byte.writer, actor)) {
    return "no barrier since another thread's write";
  }
  if (write && racing_reader(byte, actor, who)) {
    return "no barrier since another thread's read";
  }
  if (write) {
    byte.writer = actor;
    byte.in_flight = false;
    byte.written_atomically = atomic;
  } else if (!atomic) {
    note_reader(byte, actor);
  }
  return nullptr;
}

}  // namespace kvquant::emulator
