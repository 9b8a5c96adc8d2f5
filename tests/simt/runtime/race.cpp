// The race checker: finds accesses to one place that nothing orders, whatever the schedule did.
//
// GCC's -fsanitize=thread calls a function at each access to memory. These functions are here;
// libtsan, which knows nothing of barriers between fibers, is not linked.
//
// Two accesses of one launch, one of them a write, are ordered if they are one thread's, if a
// barrier of the block lies between them, or, within a warp, a __syncwarp of both lanes. Shuffles
// and mma order nothing. Of global memory, writes alone are remembered: a read before another
// thread's write shows in a schedule where it comes after.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace fr::simt {
namespace {

constexpr int kNobody = -1, kSeveral = -2;

// When a thread did something: intervals between barriers, and epochs between its __syncwarp.
struct Moment {
  uint32_t interval, epoch;
};

struct SharedByte {
  uint64_t block = 0;  // all else is old if this is not the block that runs
  bool taken = false, written = false, under_way = false;
  int writer = kNobody;
  Moment write_time{};
  void* write_pc = nullptr;
  int reading_warp = kNobody;
  uint32_t reading_lanes = 0;
  Moment read_time{};
  void* read_pc = nullptr;
};

struct GlobalPair {  // of two bytes, the smallest element
  uint32_t launch = 0, block = 0;
  int writer = kNobody;
  Moment time{};
  void* pc = nullptr;
};

constexpr int kPageBits = 12;
using Page = std::array<GlobalPair, (1 << kPageBits) / 2>;

// A warp's vector clocks: what lane i knows of lane j's epoch.
struct Clocks {
  uint32_t of[kWarp][kWarp];
};

std::vector<SharedByte> shared_bytes;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::vector<Clocks> clocks;
unsigned char* shared_base = nullptr;
size_t shared_size = 0;
uint64_t block_number = 0;   // counts all blocks of all launches
uint32_t launch_number = 0;  // counts launches
std::set<std::pair<void*, std::string>> told;

std::string place(void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return "?";
  char text[32];
  // The call lies before the address to which it returns.
  std::snprintf(
      text, sizeof text, "pc+0x%lx",
      static_cast<unsigned long>(static_cast<char*>(pc) - static_cast<char*>(info.dli_fbase) - 1));
  return text;
}

void tell(const std::string& kind, void* pc, const std::string& other = "") {
  if (!told.insert({pc, kind}).second) return;
  report(kind + " at " + place(pc) + other + "  [" + whereabouts() + "]");
}

std::string by(int thread, void* pc) {
  const std::string who = thread >= 0 ? "thread " + std::to_string(thread) : "several threads";
  return ", by " + who + " at " + place(pc);
}

uint32_t (&clocks_of(const Thread& t)) [kWarp] { return clocks[t.warp].of[t.lane]; }

Moment now(const Thread& t) {
  return {machine->barrier.generation, clocks_of(t)[t.lane]};
}

bool ordered(int before, const Moment& at, const Thread& t) {
  if (before == t.linear || at.interval != machine->barrier.generation) return true;
  return before / kWarp == t.warp && clocks_of(t)[before % kWarp] >= at.epoch;
}

bool reads_ordered(const SharedByte& b, const Thread& t) {
  if (b.reading_warp == kNobody || b.read_time.interval != machine->barrier.generation) return true;
  if (b.reading_warp != t.warp) return false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (b.reading_lanes >> lane & 1 && !ordered(t.warp * kWarp + lane, b.read_time, t)) {
      return false;
    }
  }
  return true;
}

void remember_read(SharedByte& b, const Thread& t, void* pc) {
  const Moment time = now(t);
  const bool same_interval = b.read_time.interval == time.interval;
  if (b.reading_warp == kNobody || !same_interval) {
    b.reading_warp = t.warp;
    b.reading_lanes = 0;
  } else if (b.reading_warp != t.warp) {
    b.reading_warp = kSeveral;
  } else if (reads_ordered(b, t)) {
    b.reading_lanes = 0;
  }
  b.reading_lanes |= 1u << t.lane;
  b.read_time = time;
  b.read_pc = pc;
}

void shared_access(size_t offset, size_t bytes, bool is_write, void* pc) {
  const Thread& t = machine->thread();
  const std::string at = " of shared memory";
  for (size_t i = offset; i < offset + bytes && i < shared_size; ++i) {
    SharedByte& b = shared_bytes[i];
    if (b.block != block_number) b = SharedByte{block_number};
    if (!b.taken) return tell("access out of bounds" + at, pc);
    if (b.under_way) {
      return tell(std::string(is_write ? "write" : "read") + " of data under way" + at, pc,
                  by(b.writer, b.write_pc));
    }
    if (!is_write && !b.written) return tell("read of uninitialised bytes" + at, pc);
    if (b.writer != kNobody && !ordered(b.writer, b.write_time, t)) {
      tell(std::string("race: ") + (is_write ? "write" : "read") + " after write" + at, pc,
           by(b.writer, b.write_pc));
    }
    if (is_write && !reads_ordered(b, t)) {
      tell("race: write after read" + at, pc, by(kSeveral, b.read_pc));
    }
    if (is_write) {
      b.writer = t.linear;
      b.write_time = now(t);
      b.write_pc = pc;
      b.written = true;
    } else {
      remember_read(b, t, pc);
    }
  }
}

Page* page_of(uintptr_t address, bool make) {
  thread_local uintptr_t last_number = 0;
  thread_local Page* last = nullptr;
  const uintptr_t number = address >> kPageBits;
  if (last && number == last_number) return last;
  const auto found = pages.find(number);
  if (found == pages.end() && !make) return nullptr;
  last =
      found != pages.end() ? found->second.get() : (pages[number] = std::make_unique<Page>()).get();
  last_number = number;
  return last;
}

void global_access(uintptr_t address, size_t bytes, bool is_write, void* pc) {
  const Thread& t = machine->thread();
  const uint3& b = machine->geometry.block_index;
  const dim3& grid = machine->geometry.grid;
  const uint32_t block = b.x + grid.x * (b.y + grid.y * b.z);
  for (uintptr_t a = address & ~uintptr_t{1}; a < address + bytes; a += 2) {
    Page* const page = page_of(a, is_write);
    if (!page) continue;
    GlobalPair& p = (*page)[(a & ((1u << kPageBits) - 1)) / 2];
    if (p.launch == launch_number && (p.block != block || !ordered(p.writer, p.time, t))) {
      tell(std::string("race: ") + (is_write ? "write" : "read") + " after write of global memory",
           pc, by(p.writer, p.pc) + " of block " + std::to_string(p.block));
    }
    if (is_write) p = {launch_number, block, t.linear, now(t), pc};
  }
}

void access(const void* address, size_t bytes, bool is_write, void* pc) {
  if (!current || !machine) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto base = reinterpret_cast<uintptr_t>(shared_base);
  if (at - base < shared_size) return shared_access(at - base, bytes, is_write, pc);
  const auto stack = reinterpret_cast<uintptr_t>(machine->thread().stack);
  if (at - stack < kStackBytes) return;
  global_access(at, bytes, is_write, pc);
}

}  // namespace

void race_begin_block(unsigned char* shared, size_t bytes) {
  shared_base = shared;
  shared_size = bytes;
  if (shared_bytes.size() < bytes) shared_bytes.resize(bytes);
  ++block_number;
  clocks.resize(machine->warps.size());
  std::memset(clocks.data(), 0, clocks.size() * sizeof(Clocks));
  for (Clocks& c : clocks) {
    for (int lane = 0; lane < kWarp; ++lane) c.of[lane][lane] = 1;
  }
}

void race_begin_launch() {
  ++launch_number;
  told.clear();
}

void race_take(unsigned char* buffer, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    SharedByte& b = shared_bytes[buffer - shared_base + i];
    b = SharedByte{block_number};
    b.taken = true;
  }
}

void race_begin_copy(unsigned char* to, void* pc) {
  const size_t offset = static_cast<size_t>(to - shared_base);
  if (offset >= shared_size) return;
  shared_access(offset, 16, true, pc);
  for (size_t i = offset; i < offset + 16; ++i) shared_bytes[i].under_way = true;
}

void race_end_copy(unsigned char* to, void* pc) {
  const size_t offset = static_cast<size_t>(to - shared_base);
  for (size_t i = offset; i < offset + 16; ++i) shared_bytes[i].under_way = false;
  shared_access(offset, 16, true, pc);
}

void race_sync_warp(uint32_t mask) {
  auto& of = clocks[machine->thread().warp].of;
  uint32_t joined[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < kWarp; ++other) {
      joined[other] = joined[other] < of[lane][other] ? of[lane][other] : joined[other];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::memcpy(of[lane], joined, sizeof joined);
    ++of[lane][lane];
  }
}

}  // namespace fr::simt

// What -fsanitize=thread calls.
#define FR_PC __builtin_return_address(0)
#define FR_ACCESS(prefix, bytes)                                                           \
  void __tsan_##prefix##read##bytes(void* p) { fr::simt::access(p, bytes, false, FR_PC); } \
  void __tsan_##prefix##write##bytes(void* p) { fr::simt::access(p, bytes, true, FR_PC); }
#define FR_ACCESSES(bytes)     \
  FR_ACCESS(, bytes)           \
  FR_ACCESS(unaligned_, bytes) \
  FR_ACCESS(volatile_, bytes)

extern "C" {
FR_ACCESSES(1)
FR_ACCESSES(2)
FR_ACCESSES(4)
FR_ACCESSES(8)
FR_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { fr::simt::access(p, bytes, false, FR_PC); }
void __tsan_write_range(void* p, size_t bytes) { fr::simt::access(p, bytes, true, FR_PC); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
