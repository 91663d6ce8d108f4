// State that the scheduler (machine.cc) and the memory (memory.cc) of the emulated machine share.
#pragma once

#include <vector>

#include "fiber.h"
#include "machine.h"

namespace kvquant::emulator {

constexpr int kMaxThreads = 1024;

struct Copy {
  uint32_t to;
  uint32_t bytes;
  uint8_t data[16];
  int group;  // 0: not committed yet
};

enum class State { kReady, kAtBlockBarrier, kInCollective, kExited };

struct Thread {
  Fiber fiber;
  State state;
  Site site;  // where it waits
  uint32_t warp_epoch;
  bool waited;  // for the kernels before this one
  std::vector<Copy> copies;
  int groups;
};

struct Warp {
  int arrived;
  const char* name;  // of the collective that its lanes wait in
  Site site;
  void* operands[32];
};

struct Array {
  const char* name;
  uint32_t begin, end;
};

struct Range {
  uint8_t* begin;
  uint8_t* end;
  bool writable;
  Byte* bytes;  // of a writable range during a launch
};

struct Machine {
  const char* kernel;
  Launch launch;
  void (*body)(void* const*);
  void* const* arguments;
  char* message;
  int message_size;
  bool failed;

  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  Fiber scheduler;
  int at_block_barrier, exited;
  uint32_t block, blocks_before, epoch;

  std::vector<Array> arrays;
  std::vector<Range> allowed;  // as registered
  std::vector<Range> ranges;   // of the launch: writable ones joined where they overlap
};
extern Machine m;

inline Thread& self() { return m.threads[place.thread]; }
inline Actor actor() { return {m.block, m.epoch, self().warp_epoch, uint16_t(place.thread)}; }

constexpr uint32_t kDynamicLimit = 227 * 1024;  // bytes of shared memory that a block may ask for

// A launch begins and ends: the bytes that it may write get their shadow. A block begins: its
// shared memory is poisoned.
void begin_launch();
void end_launch();
void begin_block();

}  // namespace kvquant::emulator
