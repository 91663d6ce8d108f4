// The emulated machine, as the primitives see it: the running thread, its block's shared memory,
// the global memory that a launch may touch, barriers and warp collectives. Every fault ends the
// launch with a message that names the kernel, the block, the thread and the access.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "shadow.h"

namespace kvquant::emulator {

// A source line of a kernel; primitives get theirs through KVQUANT_SITE, their last parameter.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define KVQUANT_SITE kvquant::emulator::Site site = kvquant::emulator::Site::here()

struct Launch {
  int32_t grid[3];
  int32_t threads;
  int32_t dynamic_shared_bytes;
  int32_t starts_early;  // kernels before this one may be running
};

// Runs `body` once per thread of every block, one block after the other. Returns 0, or 1 with the
// fault in `message`.
int run(const char* kernel, const Launch& launch, void (*body)(void* const* arguments),
        void* const* arguments, char* message, int message_size);
[[noreturn]] void fault(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Place {
  int32_t thread, block[3];
};
extern Place place;  // the running thread's
const Launch& launch();

// -- shared memory: addresses count bytes ---------------------------------------------------------

// A place for an array of every block, named for messages; the dynamic one begins at 0.
uint32_t allocate_shared(const char* name, size_t bytes);
void shared_read(uint32_t address, void* to, size_t bytes, Site site);
void shared_write(uint32_t address, const void* from, size_t bytes, Site site);

// -- global memory --------------------------------------------------------------------------------

// Ends the launch with a fault if the access is outside the allowed memory, misaligned, or a race.
void global_access(const void* address, size_t bytes, Access access, Site site);

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid, Site site);
void copy_commit();
void copy_wait(int groups_in_flight);

// -- together -------------------------------------------------------------------------------------

void wait_for_grids();
void block_barrier(Site site);
void warp_barrier(Site site);

// Waits until all lanes of the warp have come to the same collective on the same line; the last one
// performs it on the operands of all.
using Perform = void (*)(void* const operands[32], Site site);
void collective(const char* name, void* operand, Perform perform, Site site);

}  // namespace kvquant::emulator
