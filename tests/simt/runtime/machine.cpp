// Fibers and their schedule.
#include "machine.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>

// Saves the registers that a callee must keep, changes stacks, and goes on there.
extern "C" void fr_simt_switch(void** save, void* to);
__asm__(R"(
  .text
  .type fr_simt_switch, @function
fr_simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
  .size fr_simt_switch, . - fr_simt_switch
)");

namespace fr::simt {

constinit thread_local Lane* current = nullptr;
constinit thread_local Machine* machine = nullptr;
uint32_t schedule_seed = 0;

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kSharedSpan = kMostSharedBytes + kMostBuffers * 2 * kGapBytes;

unsigned char* new_stack() {
  void* const base = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) std::abort();
  mprotect(base, kGuardBytes, PROT_NONE);
  return static_cast<unsigned char*>(base) + kGuardBytes;
}

void poison(const void* p, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
}
void unpoison(const void* p, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

struct Stack {
  void* bottom;
  size_t bytes;
};

Stack stack_of_os_thread() {
  thread_local const Stack stack = [] {
    Stack s{};
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &s.bottom, &s.bytes);
    pthread_attr_destroy(&attributes);
    return s;
  }();
  return stack;
}

}  // namespace

Machine::Machine()
    : shared(static_cast<unsigned char*>(std::aligned_alloc(128, kSharedSpan / 128 * 128 + 128))) {}

uint32_t Machine::random() {  // Marsaglia's xorshift64*
  random_state_ ^= random_state_ >> 12;
  random_state_ ^= random_state_ << 25;
  random_state_ ^= random_state_ >> 27;
  return static_cast<uint32_t>(random_state_ * 0x2545f4914f6cdd1dull >> 32);
}

template <class T>
void Machine::shuffle(std::vector<T>& v) {
  for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[random() % i]);
}

void Machine::prepare(uint64_t block) {
  const dim3 grid = launch->grid, size = launch->block;
  geometry = {
      grid,
      size,
      {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
       static_cast<unsigned>(block / grid.x / grid.y)}};
  shuffled_ = schedule_seed != 0;
  random_state_ = (block + 1) * 0x9e3779b97f4a7c15ull ^ schedule_seed;
  count_ = live = static_cast<int>(size.x * size.y * size.z);
  barrier = {1, 0, {}};
  buffers.clear();

  const size_t span = launch->shared + kMostBuffers * 2 * kGapBytes;
  unpoison(shared, kSharedSpan);
  std::memset(shared, 0xff, span);  // NaN in every format, so that what nobody wrote shows
  poison(shared, kSharedSpan);

  if (threads_.size() < static_cast<size_t>(count_)) threads_.resize(count_);
  warps.resize((count_ + kWarp - 1) / kWarp);
  for (Warp& warp : warps) {
    warp.order.clear();
    warp.whole.arrived = 0;
    for (auto& collective : warp.collectives) collective->arrived = 0;
  }
  if (race_begin_block) race_begin_block(shared, span);
  for (int i = 0; i < count_; ++i) {
    Thread& t = threads_[i];
    if (!t.stack) t.stack = new_stack();
    unpoison(t.stack, kStackBytes);
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.geometry = &geometry;
    t.linear = i;
    t.warp = i / kWarp;
    t.lane = i % kWarp;
    t.done = false;
    t.waits_for = nullptr;
    t.copies.clear();
    t.copy_group = 0;
    t.fake_stack = nullptr;
    // As fr_simt_switch leaves a stack: registers, where to return to, and above an aligned frame.
    void** top = reinterpret_cast<void**>(t.stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    t.stack_pointer = top;
    warps[t.warp].order.push_back(i);
  }
  for (Warp& warp : warps) {
    if (shuffled_) shuffle(warp.order);
    for (size_t turn = 0; turn < warp.order.size(); ++turn) {
      threads_[warp.order[turn]].turn = static_cast<int>(turn);
    }
  }
}

bool Machine::ready(const Thread& t) const {
  return !t.done && (!t.waits_for || *t.waits_for != t.waits_at);
}

Thread* Machine::next_of_warp(const Thread& after) {
  if (shuffled_ && random() % 8 == 0) return nullptr;  // let other warps come in between
  const std::vector<int>& order = warps[after.warp].order;
  const int lanes = static_cast<int>(order.size());
  for (int i = after.turn + 1; i < lanes; ++i) {
    if (ready(threads_[order[i]])) return &threads_[order[i]];
  }
  for (int i = 0; i < after.turn; ++i) {
    if (ready(threads_[order[i]])) return &threads_[order[i]];
  }
  return nullptr;
}

// `from` and `to`: null for the OS thread's own stack.
void Machine::switch_from(Thread* from, Thread* to, bool for_ever) {
  void** const fake = from ? &from->fake_stack : &main_fake_stack_;
  if (__sanitizer_start_switch_fiber) {
    const Stack stack = to ? Stack{to->stack, kStackBytes} : stack_of_os_thread();
    __sanitizer_start_switch_fiber(for_ever ? nullptr : fake, stack.bottom, stack.bytes);
  }
  current = to;
  fr_simt_switch(from ? &from->stack_pointer : &main_stack_pointer_,
                 to ? to->stack_pointer : main_stack_pointer_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
}

void Machine::wait(const uint32_t* generation, Place where) {
  Thread& self = thread();
  self.waits_for = generation;
  self.waits_at = *generation;
  self.waits_where = where;
  switch_from(&self, next_of_warp(self), false);
  self.waits_for = nullptr;
}

void Machine::thread_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  Machine& m = *machine;
  m.launch->kernel.call(m.launch->kernel.arguments);
  m.end_thread();
  std::abort();
}

void Machine::end_thread() {
  Thread& self = thread();
  if (!self.copies.empty()) fail("the thread ends while its cp.async is under way");
  if (barrier.arrived) {
    fail("the thread ends while others wait at " + to_string(barrier.where) +
         ": not all threads of the block reach the barrier");
  }
  self.done = true;
  --live;
  switch_from(&self, next_of_warp(self), true);
}

void Machine::fail(const std::string& what) {
  report(what + "  [" + whereabouts() + "]");
  launch->failed = true;
  switch_from(&thread(), nullptr, true);
  std::abort();
}

void Machine::run_block() {
  std::vector<int> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  while (live && !launch->failed) {
    bool progress = false;
    if (shuffled_) shuffle(order);
    for (const int w : order) {
      for (const int i : warps[w].order) {
        if (!ready(threads_[i])) continue;
        switch_from(nullptr, &threads_[i], false);
        progress = true;
        if (launch->failed) return;
      }
    }
    if (progress) continue;
    std::string what = "deadlock, threads wait for others that do not come:";
    int told = 0;
    for (int i = 0; i < count_ && told < 4; ++i) {
      if (threads_[i].done) continue;
      if (told++ == 0) current = &threads_[i];  // for whereabouts()
      what += " thread " + std::to_string(i) + " at " + to_string(threads_[i].waits_where) + ";";
    }
    report(what + " " + std::to_string(count_ - live) + " of " + std::to_string(count_) +
           " have ended  [" + whereabouts() + "]");
    current = nullptr;
    launch->failed = true;
  }
}

void Machine::run(Launch& l) {
  machine = this;
  launch = &l;
  const uint64_t blocks = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  for (uint64_t i; !l.failed && (i = l.next_block++) < blocks;) {
    prepare(l.order.empty() ? i : l.order[i]);
    run_block();
  }
  unpoison(shared, kSharedSpan);
  machine = nullptr;
}

namespace {

bool is_possible(const Launch& l) {
  const dim3 &g = l.grid, &b = l.block;
  const uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
  std::string why;
  if (!g.x || !g.y || !g.z) why = "a grid of no blocks";
  if (!threads) why = "a block of no threads";
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) why = "a grid that is too large";
  if (threads > 1024 || b.z > 64) why = "a block of more than 1024 threads (or 64 in z)";
  if (l.shared > kMostSharedBytes) why = "more shared memory than 99 KiB";
  if (why.empty()) return true;
  report("launch of " + kernel_name(l.kernel.address, true) + " with " + why + ": grid " +
         to_string(g) + ", block " + to_string(b) + ", shared memory " + std::to_string(l.shared));
  return false;
}

size_t os_threads() {
  if (race_begin_block) return 1;  // the checker knows one block at a time
  const char* const wanted = std::getenv("FR_SIMT_THREADS");
  const int most = wanted ? std::atoi(wanted) : 2;
  return std::clamp<size_t>(std::thread::hardware_concurrency(), 1, std::max(most, 1));
}

}  // namespace

cudaError_t execute(const Kernel& kernel, dim3 grid, dim3 block, size_t shared) {
  static std::mutex one_at_a_time;
  static std::vector<std::unique_ptr<Machine>> machines;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch launch;
  launch.kernel = kernel;
  launch.grid = grid;
  launch.block = block;
  launch.shared = shared;
  if (!is_possible(launch)) return cudaErrorInvalidConfiguration;
  record_launch(kernel, grid, block, shared);
  if (race_begin_launch) race_begin_launch();
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (schedule_seed) {
    launch.order.resize(blocks);
    std::iota(launch.order.begin(), launch.order.end(), 0u);
    uint64_t state = schedule_seed;
    for (uint64_t i = blocks; i > 1; --i) {  // Knuth's generator: any order will do
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(launch.order[i - 1], launch.order[(state >> 33) % i]);
    }
  }
  const size_t used = std::min<size_t>(os_threads(), blocks);
  while (machines.size() < used) machines.push_back(std::make_unique<Machine>());
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < used; ++i) {
    helpers.emplace_back([&launch, i] { machines[i]->run(launch); });
  }
  machines[0]->run(launch);
  for (std::thread& helper : helpers) helper.join();
  return launch.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

unsigned char* shared_begin() { return machine->shared; }

unsigned char* take_shared(size_t offset, size_t bytes, int index) {
  Machine& m = *machine;
  unsigned char* const buffer = m.shared + offset + static_cast<size_t>(index + 1) * kGapBytes;
  if (index < static_cast<int>(m.buffers.size())) {
    if (m.buffers[index] != bytes) m.fail("threads take shared buffers of different sizes");
    return buffer;
  }
  if (offset + bytes > m.launch->shared) {
    m.fail("the kernel takes " + std::to_string(offset + bytes) +
           " bytes of shared memory, the launch gave " + std::to_string(m.launch->shared));
  }
  if (index >= kMostBuffers) m.fail("too many shared buffers for the simulator");
  m.buffers.push_back(bytes);
  unpoison(buffer, bytes);
  if (race_take) race_take(buffer, bytes);
  return buffer;
}

}  // namespace fr::simt
