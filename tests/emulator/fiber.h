// Fibers: the threads of an emulated block are functions with stacks of their own, and one runs
// until it waits.
#pragma once

#include <stddef.h>

namespace kvquant::emulator {

// A place to go on from: the stack of a fiber that waits, or of the scheduler.
struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // null: the scheduler, which runs on the caller's stack
  size_t stack_size = 0;
};

// Gives `fiber` a stack (once) and lets it begin at `entry`, which must not return.
void prepare(Fiber& fiber, void (*entry)());
// Takes the stack away. Each is two of the mappings of a process, which may have 65,530.
void release(Fiber& fiber);
// Leaves `from`, which can be resumed later, and goes on with `to`.
void resume(Fiber& from, Fiber& to);
// To be called first in a new fiber, where no resume() returns.
void arrived();

}  // namespace kvquant::emulator
