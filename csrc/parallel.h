// PyTorch's threads.
#pragma once

#include <omp.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

#include "errors.h"

#ifndef _OPENMP
#error "compile with -fopenmp; without it a thread team has one thread"
#endif

namespace fr {

// The first exception that any of several threads raised.
class FirstError {
 public:
  bool raised() const { return raised_; }

  void set(std::exception_ptr error) {
    if (!raised_.exchange(true)) error_ = std::move(error);
  }

  // To be called by one thread, after the others have finished.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> raised_{false};
  std::exception_ptr error_;
};

inline int64_t get_num_threads() {
  uint32_t threads = 1;
  FR_CHECK(torch_get_num_threads(&threads) == AOTI_TORCH_SUCCESS,
           "fused_resnet: PyTorch does not say how many threads it has");
  return threads;
}

// PyTorch's threads are OpenMP's.
inline bool in_parallel_region() { return omp_in_parallel() != 0; }

// Calls body(first, last) for ranges of [begin, end) from several threads; a range has at least
// `grain` elements. No exception may pass through PyTorch's C interface.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  struct Loop {
    const Body& body;
    FirstError error;
  } loop{body, {}};
  const auto run = [](int64_t first, int64_t last, void* context) {
    Loop& loop = *static_cast<Loop*>(context);
    try {
      loop.body(first, last);
    } catch (...) {
      loop.error.set(std::current_exception());
    }
  };
  FR_CHECK(torch_parallel_for(begin, end, grain, run, &loop) == AOTI_TORCH_SUCCESS,
           "fused_resnet: PyTorch's parallel_for failed");
  loop.error.rethrow();
}

}  // namespace fr
