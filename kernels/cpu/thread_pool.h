// Threads, the host's or a small pool of our own, and memory that each thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kvquant {

// `GOMP_parallel` of an OpenMP runtime: calls work(data) on `threads` threads, the caller's among
// them, and returns when every call has returned. Null: a pool of our own.
using OpenMpParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(OpenMpParallel parallel);

// Calls task(context, i, previous) once for every i < count, on at most `threads` threads (the
// caller is one), and returns when all are done. Which thread takes which i is not defined, so the
// result of a task must depend on i alone. `previous`: the i that this thread took before in the
// same call, whose task memory is as it left it, or -1. If another call holds our own pool, this one
// runs on the caller's thread.
using Task = void (*)(void* context, int64_t i, int64_t previous);
void parallel_for(int64_t count, int64_t threads, Task task, void* context);

template <class F>
void parallel_for(int64_t count, int64_t threads, F& f) {
  parallel_for(
      count, threads,
      [](void* context, int64_t i, int64_t previous) {
        if constexpr (std::is_invocable<F, int64_t, int64_t>::value)
          (*static_cast<F*>(context))(i, previous);
        else
          (*static_cast<F*>(context))(i);
      },
      &f);
}

// At least `bytes` bytes, aligned to 64, which belong to the calling thread until its next call
// with the same slot; null if there is no memory. One slot is for the memory of a task, the other
// for the memory that the caller of parallel_for shares with its tasks.
enum ScratchSlot { kTaskScratch = 0, kCallScratch = 1 };
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace kvquant
