#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "fiber.h"

namespace kvquant::emulator {

Place place;

namespace {

// The shared arena: dynamic memory at 0, the kernel's arrays from kStatic on, gaps between them.
constexpr uint32_t kDynamicLimit = 227 * 1024, kStatic = 256 * 1024, kArena = 512 * 1024,
                   kGap = 256;
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
  size_t last_range;
};
Machine m;
alignas(128) uint8_t arena[kArena];
Byte arena_bytes[kArena];

Thread& self() { return m.threads[place.thread]; }
Actor actor() { return {m.block, m.epoch, self().warp_epoch, uint16_t(place.thread)}; }
const char* base_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

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
  if (m.at_block_barrier) fault(end, "the thread ends while others wait at a block barrier");
  if (m.warps[place.thread / 32].arrived) {
    fault(end, "the thread ends while other lanes of its warp wait in %s",
          m.warps[place.thread / 32].name);
  }
  ++m.exited;
  wait_in(State::kExited, end);
  abort();  // nobody resumes it
}

const Array* array_of(uint32_t address) {
  for (const Array& array : m.arrays) {
    if (address >= array.begin && address < array.end) return &array;
  }
  return nullptr;
}

// The launch's view of an access to shared memory; `byte` of `bytes` is the first that fails.
void examine_shared(uint32_t address, size_t bytes, Access access, const char* verb, Site site) {
  const Array* array = array_of(address);
  const uint32_t dynamic = uint32_t(m.launch.dynamic_shared_bytes);
  const Array whole = {"dynamic shared memory", 0, dynamic};
  if (array == nullptr && address < dynamic) array = &whole;
  if (array == nullptr || address + bytes > array->end) {
    const Array* before = nullptr;
    if (dynamic && address < kStatic) before = &whole;
    for (const Array& a : m.arrays) {
      if (a.begin <= address && (!before || a.begin > before->begin)) before = &a;
    }
    if (before == nullptr)
      fault(site, "%s %zu bytes of shared memory that is no array", verb, bytes);
    fault(site, "%s %zu bytes at byte %u of %s, which has %u", verb, bytes, address - before->begin,
          before->name, before->end - before->begin);
  }
  const uint32_t offset = address - array->begin;
  if (address % bytes) {
    fault(site, "%s %zu bytes at byte %u of %s: not aligned", verb, bytes, offset, array->name);
  }
  const Actor now = actor();
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = arena_bytes[address + i];
    if (byte.writer.block != now.block) {
      if (access == Access::kRead) {
        fault(site, "%s byte %zu of %s, which nobody wrote", verb, offset + i, array->name);
      }
      byte = Byte{};
    }
    Actor who;
    if (const char* why = examine(byte, access, now, who)) {
      fault(site, "%s byte %zu of %s: %s (thread %d)", verb, offset + i, array->name, why,
            who.thread);
    }
  }
}

Range* range_of(const uint8_t* p, size_t bytes, bool write) {
  auto holds = [&](const Range& r) { return p >= r.begin && p + bytes <= r.end; };
  if (m.last_range < m.ranges.size()) {
    Range& r = m.ranges[m.last_range];
    if (holds(r) && (r.writable || !write)) return &r;
  }
  // Writable ones come first.
  for (Range& r : m.ranges) {
    if (holds(r) && (r.writable || !write)) {
      m.last_range = size_t(&r - m.ranges.data());
      return &r;
    }
  }
  return nullptr;
}

[[noreturn]] void fault_outside(const uint8_t* p, size_t bytes, const char* verb, Site site) {
  const Range* near = nullptr;
  for (const Range& r : m.ranges) {
    if (p >= r.begin && p + bytes <= r.end) {
      fault(site, "%s %zu bytes at byte %td of a tensor that is only read", verb, bytes,
            p - r.begin);
    }
    auto distance = [p](const Range& r) { return p < r.begin ? r.begin - p : p - r.end; };
    if (near == nullptr || distance(r) < distance(*near)) near = &r;
  }
  if (near == nullptr || p == nullptr) fault(site, "%s %zu bytes at %p", verb, bytes, p);
  fault(site, "%s %zu bytes at byte %td of a tensor of %td bytes (the nearest)", verb, bytes,
        p - near->begin, near->end - near->begin);
}

void join_ranges() {
  m.ranges.clear();
  m.last_range = 0;
  for (const Range& r : m.allowed) {
    if (r.writable) m.ranges.push_back(r);
  }
  std::sort(m.ranges.begin(), m.ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const Range& r : m.ranges) {
    if (kept && r.begin < m.ranges[kept - 1].end) {
      m.ranges[kept - 1].end = std::max(m.ranges[kept - 1].end, r.end);
    } else {
      m.ranges[kept++] = r;
    }
  }
  m.ranges.resize(kept);
  for (Range& r : m.ranges) {
    r.bytes = static_cast<Byte*>(calloc(size_t(r.end - r.begin), sizeof(Byte)));
    if (r.bytes == nullptr) abort();
  }
  for (const Range& r : m.allowed) {
    if (!r.writable) m.ranges.push_back(r);
  }
}

void run_block() {
  const int n = m.launch.threads;
  ++m.block;
  m.at_block_barrier = m.exited = 0;
  m.epoch = 0;
  memset(arena, 0xff, size_t(m.launch.dynamic_shared_bytes));
  for (const Array& a : m.arrays) memset(arena + a.begin, 0xff, a.end - a.begin);
  for (int i = 0; i < n; ++i) {
    Thread& thread = m.threads[i];
    thread.state = State::kReady;
    thread.warp_epoch = 0;
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
      while (elsewhere == i || m.threads[elsewhere].state == thread.state) ++elsewhere;
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
  m.blocks_before = m.block;  // blocks count on: what older launches left in the shadow is stale
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
  join_ranges();
  for (int z = 0; z < launch.grid[2] && !m.failed; ++z) {
    for (int y = 0; y < launch.grid[1] && !m.failed; ++y) {
      for (int x = 0; x < launch.grid[0] && !m.failed; ++x) {
        place = {0, {x, y, z}};
        run_block();
      }
    }
  }
  for (Range& r : m.ranges) {
    if (r.writable) free(r.bytes);
  }
  return m.failed;
}

uint32_t allocate_shared(const char* name, size_t bytes) {
  uint32_t begin = m.arrays.empty() ? kStatic : m.arrays.back().end + kGap;
  begin = (begin + 127) / 128 * 128;
  if (begin + bytes > kArena) fault({name, 0}, "more shared arrays than the emulator has room for");
  m.arrays.push_back({name, begin, uint32_t(begin + bytes)});
  return begin;
}

void shared_read(uint32_t address, void* to, size_t bytes, Site site) {
  examine_shared(address, bytes, Access::kRead, "reads", site);
  memcpy(to, arena + address, bytes);
}

void shared_write(uint32_t address, const void* from, size_t bytes, Site site) {
  examine_shared(address, bytes, Access::kWrite, "writes", site);
  memcpy(arena + address, from, bytes);
}

void global_access(const void* address, size_t bytes, Access access, Site site) {
  const auto* p = static_cast<const uint8_t*>(address);
  const bool write = access == Access::kWrite || access == Access::kAtomicWrite;
  const char* verb = write ? "writes" : "reads";
  const Range* range = range_of(p, bytes, write);
  if (range == nullptr) fault_outside(p, bytes, verb, site);
  if (uintptr_t(p) % bytes) {
    fault(site, "%s %zu bytes at byte %td of a tensor: not aligned", verb, bytes, p - range->begin);
  }
  if (!range->writable) return;
  const Actor now = actor();
  for (size_t i = 0; i < bytes; ++i) {
    Actor who;
    if (const char* why = examine(range->bytes[p + i - range->begin], access, now, who)) {
      fault(site, "%s byte %td of a tensor of %td bytes: %s (thread %d of block %u of the grid)",
            verb, p + i - range->begin, range->end - range->begin, why, who.thread,
            who.block - m.blocks_before - 1);
    }
  }
}

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid, Site site) {
  Copy copy = {to, uint32_t(bytes), {}, 0};
  if (valid) {
    global_access(from, bytes, Access::kRead, site);
    memcpy(copy.data, from, bytes);
  }
  examine_shared(to, bytes, Access::kWrite, "copies to", site);
  memset(arena + to, 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i) arena_bytes[to + i].in_flight = true;
  self().copies.push_back(copy);
}

void copy_commit() {
  Thread& thread = self();
  ++thread.groups;
  for (Copy& copy : thread.copies) {
    if (copy.group == 0) copy.group = thread.groups;
  }
}

void copy_wait(int groups_in_flight) {
  Thread& thread = self();
  const Actor now = actor();
  size_t kept = 0;
  for (const Copy& copy : thread.copies) {
    if (copy.group == 0 || copy.group > thread.groups - groups_in_flight) {
      thread.copies[kept++] = copy;
      continue;
    }
    memcpy(arena + copy.to, copy.data, copy.bytes);
    for (uint32_t i = 0; i < copy.bytes; ++i) {
      arena_bytes[copy.to + i].in_flight = false;
      arena_bytes[copy.to + i].writer = now;
    }
  }
  thread.copies.resize(kept);
}

void block_barrier(Site site) {
  if (m.exited) fault(site, "a block barrier that a thread of the block ended before");
  const int n = m.launch.threads;
  for (int i = 0; i < n && m.at_block_barrier; ++i) {
    const Thread& other = m.threads[i];
    if (other.state == State::kAtBlockBarrier && other.site.line != site.line) {
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
  if (warp.arrived && (strcmp(warp.name, name) || warp.site.line != site.line)) {
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

// What the launches of this library may touch: the addresses of the caller's tensors.
extern "C" __attribute__((visibility("default"))) void kvquant_emulate_allow(void* base,
                                                                             int64_t bytes,
                                                                             int writable) {
  auto* begin = static_cast<uint8_t*>(base);
  kvquant::emulator::m.allowed.push_back({begin, begin + bytes, writable != 0, nullptr});
}
extern "C" __attribute__((visibility("default"))) void kvquant_emulate_forget() {
  kvquant::emulator::m.allowed.clear();
}
