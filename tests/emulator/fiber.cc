#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace kvquant::emulator {
namespace {

constexpr size_t kGuard = 4096, kStack = 128 * 1024;

}  // namespace

// ucontext saves the signal mask with a system call per switch; on x86-64 the registers that a
// function must preserve are all that has to be kept.
#ifdef __x86_64__
extern "C" void kvquant_switch_stack(void** from, void* to);
asm(R"(
.text
.type kvquant_switch_stack, @function
kvquant_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvquant_switch_stack, . - kvquant_switch_stack
)");
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) {
    void* p =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) {
      perror("no stack for an emulated thread");
      abort();
    }
    fiber.stack = static_cast<char*>(p) + kGuard;
    fiber.stack_size = kStack;
#ifndef __x86_64__
    fiber.stack_pointer = new ucontext_t;
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_size);  // the last thread never returned
#endif
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_size);
  *--top = nullptr;  // where entry would return to: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  auto* context = static_cast<ucontext_t*>(fiber.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = fiber.stack_size;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

void release(Fiber& fiber) {
  if (fiber.stack == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_size);
#endif
  munmap(fiber.stack - kGuard, kGuard + kStack);
  fiber.stack = nullptr;
#ifndef __x86_64__
  delete static_cast<ucontext_t*>(fiber.stack_pointer);
  fiber.stack_pointer = nullptr;
#endif
}

#if defined(__SANITIZE_ADDRESS__)
namespace {
Fiber* left;  // the fiber that the last resume() came from
void* false_stack;
}  // namespace
// The first time that the scheduler is left tells where its stack is.
void arrived() {
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (left->stack == nullptr) {
    false_stack = const_cast<void*>(bottom);
    left->stack_size = size;
  }
}
#else
void arrived() {}
#endif

void resume(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  left = &from;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.stack ? to.stack : false_stack, to.stack_size);
#endif
#ifdef __x86_64__
  kvquant_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  if (from.stack_pointer == nullptr) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

}  // namespace kvquant::emulator
