// Threads that run one loop after another, and wait for each other between two.
//
// at::parallel_for starts ATen's threads for one loop and parts with them behind it, which takes 2
// us on two cores, a barrier 0.5. A loop of a ResNet-56 takes 8 at batch 1, and there are 54.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
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

// One thread's place in a team. Every thread of a team starts the same loops in the same order.
class Worker {
 public:
  Worker(int64_t rank, int64_t team_size, Failure& failure)
      : rank_(rank), team_size_(team_size), failure_(failure) {}

  int64_t team_size() const { return team_size_; }

  // Calls body(begin, end) with this thread's share of [0, count), when all others are done with
  // the loop before. A share has `grain` at least. After a failure a loop only waits.
  template <class Body>
  void loop(int64_t count, int64_t grain, const Body& body) {
    if (is_first_) {
      is_first_ = false;
    } else if (team_size_ > 1) {
      wait();
    }
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
  Failure& failure_;
  bool is_first_ = true;

  // For all threads that there are: those of the team, however many were asked for.
  static void wait() {
#pragma omp barrier
  }
};

// Calls task(worker) on each of ATen's threads, or on this one alone inside another loop. What a
// task does outside its loops all threads do, so that it throws in all of them or in none.
template <class Task>
void in_team(const Task& task) {
  Failure failure;
  const auto run = [&](int64_t rank, int64_t team_size) {
    const c10::ParallelGuard guard(true);
    Worker worker(rank, team_size, failure);
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
