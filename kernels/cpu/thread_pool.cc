// Work runs on the host's OpenMP threads if there are any: they spin between two operators of the
// host, so a second set of threads would find every core busy. Without them, and in a forked
// process, which has lost them, work runs on a pool of our own. Its workers sleep on a condition
// variable, but spin for a moment first: the layers of a decode step call in quick succession, and
// waking up takes as long as a short layer.
#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>

namespace kvquant {
namespace {

constexpr int kMaxWorkers = 255;
constexpr std::chrono::microseconds kSpin(30);
constexpr int kPausesPerClock = 32;       // the clock is read only this often
constexpr int kPausesBeforeYield = 4096;  // while the last items run on other threads
constexpr int kShares = 4;                // of the items that are left, for each thread

// A thread takes several items at once, since consecutive ones read consecutive memory: a share of
// those that are left, so that all threads end at the same time.
struct Job {
  Task task = nullptr;
  void* context = nullptr;
  int64_t count = 0, threads = 1;
  std::atomic<int64_t> next{0};

  void run() {
    int64_t previous = -1;
    for (int64_t i = next.load(std::memory_order_relaxed); i < count;) {
      const int64_t share = (count - i) / (kShares * threads), end = i + (share > 1 ? share : 1);
      if (!next.compare_exchange_weak(i, end, std::memory_order_relaxed)) continue;
      for (; i < end; previous = i++) task(context, i, previous);
      i = next.load(std::memory_order_relaxed);
    }
  }
};

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  sched_yield();
#endif
}

class Pool {
 public:
  // Held by one caller at a time.
  std::mutex in_use;

  //   caller   publish job, tickets = helpers | run items .. | tickets = 0 | until done = joined
  //   worker   spin, then sleep               | take a ticket, run items .., done + 1
  // A worker that wakes up too late finds no ticket, so a short job never waits for it.
  void run(int64_t threads, Job& job) {
    int wanted = int(threads - 1 < kMaxWorkers ? threads - 1 : kMaxWorkers);
    while (num_workers_ < wanted && start_worker()) {
    }
    int helpers = wanted < num_workers_ ? wanted : num_workers_;
    done_.store(0, std::memory_order_relaxed);
    job_.store(&job, std::memory_order_relaxed);
    tickets_.store(helpers, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
    job.run();
    int left = tickets_.exchange(0, std::memory_order_acq_rel);
    int joined = helpers - (left > 0 ? left : 0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < joined; ++spins) {
      if (spins < kPausesBeforeYield) {
        pause_briefly();
      } else {
        sched_yield();
      }
    }
  }

 private:
  bool start_worker() {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, &Pool::work, this) != 0) return false;
    pthread_detach(thread);
    ++num_workers_;
    return true;
  }

  static void* work(void* argument) {
    Pool& pool = *static_cast<Pool*>(argument);
    for (uint64_t seen = 0;;) {
      seen = pool.wait_for_change(seen);
      if (pool.tickets_.fetch_sub(1, std::memory_order_acq_rel) <= 0) continue;
      pool.job_.load(std::memory_order_relaxed)->run();
      pool.done_.fetch_add(1, std::memory_order_release);
    }
    return nullptr;
  }

  uint64_t wait_for_change(uint64_t seen) {
    uint64_t now;
    auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < kPausesPerClock; ++i) {
        if ((now = epoch_.load(std::memory_order_acquire)) != seen) return now;
        pause_briefly();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    while ((now = epoch_.load(std::memory_order_acquire)) == seen) wake_.wait(lock);
    asleep_.fetch_sub(1);
    return now;
  }

  int num_workers_ = 0;
  std::mutex mutex_;  // guards going to sleep and waking up
  std::condition_variable wake_;
  std::atomic<int> asleep_{0}, tickets_{0}, done_{0};
  std::atomic<uint64_t> epoch_{0};
  std::atomic<Job*> job_{nullptr};
};

std::atomic<Pool*> the_pool{nullptr};

std::atomic<OpenMpParallel> openmp_parallel{nullptr};

// Threads do not survive a fork: the child forgets them and makes a pool of its own.
void forget_threads() {
  the_pool.store(nullptr);
  openmp_parallel.store(nullptr);
}
void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_threads); });
}

Pool* pool() {
  watch_forks();
  Pool* current = the_pool.load();
  if (current != nullptr) return current;
  auto* made = new (std::nothrow) Pool;
  if (made == nullptr) return nullptr;
  if (the_pool.compare_exchange_strong(current, made)) return made;
  delete made;
  return current;
}

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch_of_thread[2];

}  // namespace

void use_openmp(OpenMpParallel parallel) {
  watch_forks();
  openmp_parallel.store(parallel);
}

void parallel_for(int64_t count, int64_t threads, Task task, void* context) {
  Job job;
  job.task = task;
  job.context = context;
  job.count = count;
  if (threads > count) threads = count;
  job.threads = threads;
  if (threads <= 1) return job.run();
  if (OpenMpParallel parallel = openmp_parallel.load()) {
    return parallel([](void* all) { static_cast<Job*>(all)->run(); }, &job, unsigned(threads), 0);
  }
  Pool* shared = pool();
  if (shared == nullptr || !shared->in_use.try_lock()) return job.run();
  shared->run(threads, job);
  shared->in_use.unlock();
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Scratch& own = scratch_of_thread[slot];
  if (own.bytes < bytes) {
    std::free(own.memory);
    own.bytes = (bytes + 4095) / 4096 * 4096;
    own.memory = std::aligned_alloc(64, own.bytes);
    if (own.memory == nullptr) own.bytes = 0;
  }
  return own.memory;
}

}  // namespace kvquant
