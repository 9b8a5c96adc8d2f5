// One OS thread of the simulator: the threads of the block that it runs.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../include/simt_runtime.h"

namespace fr::simt {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGapBytes = 128;  // behind each buffer of shared memory
constexpr int kMostBuffers = 16;
// What a block can have on every card since sm_86.
constexpr size_t kMostSharedBytes = 99 * 1024;

struct Place {
  const char* name;  // of a collective, or the file of a barrier
  int line;          // 0: a collective
};
std::string to_string(const Place& place);
std::string to_string(dim3 d);  // x,y,z

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool valid;
  uint32_t group;
};

struct Thread : Lane {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  int linear, warp, lane, turn;  // `turn`: its place in the warp's order
  bool done;
  const uint32_t* waits_for;  // goes on when this is no longer `waits_at`
  uint32_t waits_at;
  Place waits_where;
  std::vector<Copy> copies;  // under way
  uint32_t copy_group;
};

// A rendezvous of the lanes in `mask`. A lane may reach the next one before others have left this
// one, hence two sets of data.
struct Collective {
  struct Fragments {
    union {
      uint16_t a16[16][16];
      float a32[16][8];
    };
    union {
      uint16_t b16[16][8];
      float b32[8][8];
    };
    float c[16][8];
  };
  union alignas(64) Data {
    uint64_t values[kWarp];
    MatrixRow rows[kWarp];
    Fragments fragments;
    Data() {}
  };
  uint32_t mask = 0, generation = 0;
  int arrived = 0;
  const char* name = nullptr;
  Data data[2];
};

struct Warp {
  Collective whole{~uint32_t{0}};
  std::vector<std::unique_ptr<Collective>> collectives;  // of some of its lanes
  std::vector<int> order;                                // linear numbers of its threads
};

struct Barrier {
  uint32_t generation;
  int arrived;
  Place where;
};

// A launch under way, on one or several machines.
struct Launch {
  Kernel kernel;
  dim3 grid, block;
  size_t shared;
  std::vector<uint32_t> order;  // of blocks; empty: as they are numbered
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
};

class Machine {
 public:
  Machine();
  void run(Launch& launch);

  // All below is for the thread that runs.
  Thread& thread() { return *static_cast<Thread*>(current); }
  void wait(const uint32_t* generation, Place where);
  void end_thread();
  [[noreturn]] void fail(const std::string& what);

  Launch* launch = nullptr;
  Geometry geometry;
  Barrier barrier;
  std::vector<Warp> warps;
  int live = 0;
  unsigned char* shared;
  std::vector<size_t> buffers;  // bytes of those taken in this block

 private:
  void prepare(uint64_t block);
  void run_block();
  bool ready(const Thread& t) const;
  Thread* next_of_warp(const Thread& after);
  void leave(Thread& from, bool for_ever);
  void resume(Thread& to);
  void switch_from(Thread* from, Thread* to, bool for_ever);
  uint32_t random();
  template <class T>
  void shuffle(std::vector<T>& v);
  [[noreturn]] static void thread_main();

  std::vector<Thread> threads_;
  int count_ = 0;
  void* main_stack_pointer_ = nullptr;
  void* main_fake_stack_ = nullptr;
  bool shuffled_ = false;
  uint64_t random_state_ = 0;
};

extern constinit thread_local Machine* machine __attribute__((tls_model("initial-exec")));

// reports.cpp
void report(const std::string& what);
void record_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared);
std::string kernel_name(const void* address, bool demangled);
// "kernel, block (x, y, z), thread (x, y, z)" of the thread that runs.
std::string whereabouts();

extern uint32_t schedule_seed;

}  // namespace fr::simt

// Present only where a sanitizer's runtime is loaded, or the race checker is linked.
extern "C" {
#define FR_SIMT_IF_THERE __attribute__((weak))
FR_SIMT_IF_THERE void __asan_poison_memory_region(const volatile void*, size_t);
FR_SIMT_IF_THERE void __asan_unpoison_memory_region(const volatile void*, size_t);
FR_SIMT_IF_THERE void __sanitizer_start_switch_fiber(void**, const void*, size_t);
FR_SIMT_IF_THERE void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

namespace fr::simt {
FR_SIMT_IF_THERE void race_begin_launch();
FR_SIMT_IF_THERE void race_begin_block(unsigned char* shared, size_t bytes);
FR_SIMT_IF_THERE void race_take(unsigned char* buffer, size_t bytes);
FR_SIMT_IF_THERE void race_begin_copy(unsigned char* to, void* pc);
FR_SIMT_IF_THERE void race_end_copy(unsigned char* to, void* pc);
FR_SIMT_IF_THERE void race_sync_warp(uint32_t mask);
}  // namespace fr::simt
