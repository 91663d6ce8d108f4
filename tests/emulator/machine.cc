#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

namespace kvquant::emulator {

Place place;
Machine m;

namespace {

const char* base_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

void wait_in(State state, Site site) {
  Thread& thread = self();
  thread.state = state;
  thread.site = site;
  const int index = place.thread;
  resume(thread.fiber, m.scheduler);
  place.thread = index;
}

void begin_thread() {
  arrived();
  m.body(m.arguments);
  Thread& thread = self();
  const Site end = {m.kernel, 0};
  if (!thread.copies.empty()) {
    fault(end, "the thread ends with %zu cp_async copies that it did not wait for",
          thread.copies.size());
  }
  if (!thread.waited) fault(end, "the thread ends, and did not wait for the kernels before");
  if (m.at_block_barrier) fault(end, "the thread ends while others wait at a block barrier");
  if (m.warps[place.thread / 32].arrived) {
    fault(end, "the thread ends while other lanes of its warp wait in %s",
          m.warps[place.thread / 32].name);
  }
  ++m.exited;
  wait_in(State::kExited, end);
  abort();  // nobody resumes it
}

void run_block() {
  const int n = m.launch.threads;
  ++m.block;
  m.at_block_barrier = m.exited = 0;
  m.epoch = 0;
  begin_block();
  for (int i = 0; i < n; ++i) {
    Thread& thread = m.threads[i];
    thread.state = State::kReady;
    thread.warp_epoch = 0;
    thread.waited = !m.launch.starts_early;
    thread.groups = 0;
    thread.copies.clear();
    prepare(thread.fiber, begin_thread);
  }
  for (int w = 0; w < n / 32; ++w) m.warps[w].arrived = 0;
  while (m.exited < n) {
    bool ran = false;
    for (int i = 0; i < n; ++i) {
      if (m.threads[i].state != State::kReady) continue;
      ran = true;
      place.thread = i;
      resume(m.scheduler, m.threads[i].fiber);
      if (m.failed) return;
    }
    if (ran) continue;
    for (int i = 0; i < n; ++i) {
      const Thread& thread = m.threads[i];
      if (thread.state == State::kExited) continue;
      place.thread = i;
      m.failed = true;
      const bool at_barrier = thread.state == State::kAtBlockBarrier;
      int elsewhere = 0;
      while (elsewhere + 1 < n && m.threads[elsewhere].state == thread.state) ++elsewhere;
      snprintf(m.message, m.message_size,
               "%s, block (%d, %d, %d), thread %d, %s:%d: waits for ever %s; thread %d waits at "
               "%s:%d",
               m.kernel, place.block[0], place.block[1], place.block[2], i,
               base_name(thread.site.file), thread.site.line,
               at_barrier ? "at a block barrier" : "in a warp collective", elsewhere,
               base_name(m.threads[elsewhere].site.file), m.threads[elsewhere].site.line);
      return;
    }
  }
}

}  // namespace

const Launch& launch() { return m.launch; }

void fault(Site site, const char* format, ...) {
  int used =
      snprintf(m.message, m.message_size, "%s, block (%d, %d, %d), thread %d, %s:%d: ", m.kernel,
               place.block[0], place.block[1], place.block[2], place.thread, base_name(site.file),
               site.line);
  va_list list;
  va_start(list, format);
  if (used < m.message_size) vsnprintf(m.message + used, m.message_size - used, format, list);
  va_end(list);
  m.failed = true;
  resume(self().fiber, m.scheduler);
  abort();  // nobody resumes it
}

int run(const char* kernel, const Launch& launch, void (*body)(void* const*),
        void* const* arguments, char* message, int message_size) {
  m.kernel = kernel;
  m.launch = launch;
  m.body = body;
  m.arguments = arguments;
  m.message = message;
  m.message_size = message_size;
  m.failed = false;
  m.blocks_before = m.block;  // counting on makes entries of older launches in the shadow stale
  if (launch.threads <= 0 || launch.threads % 32 || launch.threads > kMaxThreads) {
    snprintf(message, message_size, "%s: %d threads; expected a multiple of 32 up to %d", kernel,
             launch.threads, kMaxThreads);
    return 1;
  }
  if (launch.dynamic_shared_bytes < 0 || uint32_t(launch.dynamic_shared_bytes) > kDynamicLimit) {
    snprintf(message, message_size, "%s: %d bytes of dynamic shared memory; expected at most %u",
             kernel, launch.dynamic_shared_bytes, kDynamicLimit);
    return 1;
  }
  begin_launch();
  for (int z = 0; z < launch.grid[2] && !m.failed; ++z) {
    for (int y = 0; y < launch.grid[1] && !m.failed; ++y) {
      for (int x = 0; x < launch.grid[0] && !m.failed; ++x) {
        place = {0, {x, y, z}};
        run_block();
      }
    }
  }
  end_launch();
  for (Thread& thread : m.threads) release(thread.fiber);
  return m.failed;
}

void wait_for_grids() { self().waited = true; }

void block_barrier(Site site) {
  if (m.exited) fault(site, "a block barrier that a thread of the block ended before");
  const int n = m.launch.threads;
  for (int i = 0; i < n && m.at_block_barrier; ++i) {
    const Thread& other = m.threads[i];
    if (other.state == State::kAtBlockBarrier && !same(other.site, site)) {
      fault(site, "a block barrier while thread %d waits at another one, %s:%d", i,
            base_name(other.site.file), other.site.line);
    }
    if (other.state == State::kAtBlockBarrier) break;
  }
  if (++m.at_block_barrier < n) return wait_in(State::kAtBlockBarrier, site);
  m.at_block_barrier = 0;
  ++m.epoch;
  for (int i = 0; i < n; ++i) m.threads[i].state = State::kReady;
}

void collective(const char* name, void* operand, Perform perform, Site site) {
  Warp& warp = m.warps[place.thread / 32];
  const int first = place.thread / 32 * 32;
  for (int i = first; i < first + 32; ++i) {
    if (m.threads[i].state == State::kExited) {
      fault(site, "%s by a warp whose lane %d has ended", name, i - first);
    }
  }
  if (warp.arrived && (strcmp(warp.name, name) || !same(warp.site, site))) {
    fault(site, "%s while other lanes of the warp are in %s of %s:%d", name, warp.name,
          base_name(warp.site.file), warp.site.line);
  }
  warp.name = name;
  warp.site = site;
  warp.operands[place.thread % 32] = operand;
  if (++warp.arrived < 32) return wait_in(State::kInCollective, site);
  warp.arrived = 0;
  if (perform) perform(warp.operands, site);
  for (int i = first; i < first + 32; ++i) m.threads[i].state = State::kReady;
}

void warp_barrier(Site site) {
  collective("warp_barrier", nullptr, nullptr, site);
  ++self().warp_epoch;
}

}  // namespace kvquant::emulator
