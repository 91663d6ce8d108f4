// Shared and global memory, and the copies between them: every access is checked before it happens.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "state.h"

namespace kvquant::emulator {
namespace {

// The shared arena: dynamic memory at 0, the kernel's arrays from kStatic on, gaps between them.
constexpr uint32_t kStatic = 256 * 1024, kArena = 512 * 1024, kGap = 256;
alignas(128) uint8_t arena[kArena];
Byte arena_bytes[kArena];

const Array* array_of(uint32_t address) {
  for (const Array& array : m.arrays) {
    if (address >= array.begin && address < array.end) return &array;
  }
  return nullptr;
}

// Checks an access to shared memory byte by byte; the first fault ends the launch.
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

// Writable ranges come first, so that their bytes are watched even where a read-only tensor
// overlaps them.
const Range* range_of(const uint8_t* p, size_t bytes, bool write) {
  for (const Range& r : m.ranges) {
    if (p >= r.begin && p + bytes <= r.end && (r.writable || !write)) return &r;
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

}  // namespace

void begin_launch() {
  m.ranges.clear();
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

void end_launch() {
  for (Range& r : m.ranges) {
    if (r.writable) free(r.bytes);
  }
}

void begin_block() {
  memset(arena, 0xff, size_t(m.launch.dynamic_shared_bytes));
  for (const Array& a : m.arrays) memset(arena + a.begin, 0xff, a.end - a.begin);
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
  if (!self().waited) {
    fault(site, "%s global memory before it has waited for the kernels before", verb);
  }
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

}  // namespace kvquant::emulator

// The memory that launches of this library may touch: the addresses of the caller's tensors.
extern "C" __attribute__((visibility("default"))) void kvquant_emulate_allow(void* base,
                                                                             int64_t bytes,
                                                                             int writable) {
  auto* begin = static_cast<uint8_t*>(base);
  kvquant::emulator::m.allowed.push_back({begin, begin + bytes, writable != 0, nullptr});
}
extern "C" __attribute__((visibility("default"))) void kvquant_emulate_forget() {
  kvquant::emulator::m.allowed.clear();
}
