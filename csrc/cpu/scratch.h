// Memory for what is needed only during a call, kept by the calling thread for its next call.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <utility>

namespace fr {

// What a thread keeps at most: more is given back when the call ends.
constexpr int64_t kKeptBytes = 16 * 1024 * 1024;

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : held_(std::exchange(kept(), {})) {
    if (held_.bytes < bytes) {
      held_.data.clear();  // before the new block is asked for: never both
      held_ = {c10::GetCPUAllocator()->allocate(bytes), bytes};
    }
  }
  ~Scratch() {
    if (held_.bytes <= kKeptBytes) kept() = std::move(held_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* get() const { return static_cast<char*>(held_.data.get()); }

 private:
  struct Block {
    c10::DataPtr data;
    int64_t bytes = 0;
  };
  Block held_;

  static Block& kept() {
    thread_local Block block;
    return block;
  }
};

}  // namespace fr
