// Threads that run one loop after another, and wait for each other between two.
//
// at::parallel_for starts ATen's threads for one loop and parts with them behind it: 0.42 us on two
// cores, OpenMP's own barrier 0.19, this one 0.04. A loop of a ResNet-56 takes 7 at batch 1.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

namespace fr {

// What went wrong first, in any thread of a team.
class Failure {
 public:
  bool raised() const { return raised_; }

  void keep(std::exception_ptr error) {
    if (!raised_.exchange(true)) error_ = std::move(error);
  }

  // For when the threads have parted.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> raised_{false};
  std::exception_ptr error_;
};

// Nobody goes on before all threads of a team are here.
class Barrier {
 public:
  // `round`: how often the caller has waited, this time included.
  void wait(int64_t round, int64_t threads) {
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    // Who still computes is soon here. Who waits for this very processor must be let in: where
    // others want it, OpenMP's barrier made a forward of half a millisecond one of 240.
    for (int64_t turn = 0; arrived_.load(std::memory_order_acquire) < round * threads; ++turn) {
      if (turn < kTurns) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int64_t kTurns = 1000;

  // Leaves the core to its other thread for a moment.
  static void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  std::atomic<int64_t> arrived_{0};
};

// One thread's place in a team. Every thread of a team starts the same loops in the same order.
class Worker {
 public:
  Worker(int64_t rank, int64_t team_size, Barrier& barrier, Failure& failure)
      : rank_(rank), team_size_(team_size), barrier_(barrier), failure_(failure) {}

  int64_t team_size() const { return team_size_; }

  // Calls body(begin, end) with this thread's share of [0, count), when all others are done with
  // the loop before. A share has `grain` at least. After a failure a loop only waits.
  template <class Body>
  void loop(int64_t count, int64_t grain, const Body& body) {
    if (loops_ > 0 && team_size_ > 1) barrier_.wait(loops_, team_size_);
    ++loops_;
    if (count == 0 || failure_.raised()) return;
    const int64_t threads = std::min(team_size_, (count + grain - 1) / grain);
    const int64_t share = (count + threads - 1) / threads;
    const int64_t begin = rank_ * share;
    if (begin >= count) return;
    try {
      body(begin, std::min(begin + share, count));
    } catch (...) {
      failure_.keep(std::current_exception());
    }
  }

 private:
  const int64_t rank_, team_size_;
  Barrier& barrier_;
  Failure& failure_;
  int64_t loops_ = 0;  // so far
};

// Calls task(worker) on each of ATen's threads, or on this one alone inside another loop. What a
// task does outside its loops all threads do, so that it throws in all of them or in none.
template <class Task>
void in_team(const Task& task) {
  Barrier barrier;
  Failure failure;
  const auto run = [&](int64_t rank, int64_t team_size) {
    const c10::ParallelGuard guard(true);
    Worker worker(rank, team_size, barrier, failure);
    try {
      task(worker);
    } catch (...) {
      failure.keep(std::current_exception());
    }
  };
  at::internal::lazy_init_num_threads();
  if (at::in_parallel_region() || at::get_num_threads() == 1) {
    run(0, 1);
  } else {
#pragma omp parallel
    run(omp_get_thread_num(), omp_get_num_threads());
  }
  failure.rethrow();
}

}  // namespace fr
