// Memory for what is needed only during a call, kept by the thread for its next call.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fr {

// What a thread keeps at most for each of the scratches that it has at once: more is given back
// when the call ends.
constexpr int64_t kKeptBytes = 16 * 1024 * 1024;

class Scratch {
 public:
  Scratch() {
    if (kept().empty()) return;
    held_ = std::move(kept().back());
    kept().pop_back();
  }
  ~Scratch() {
    if (held_.bytes > 0 && held_.bytes <= kKeptBytes) kept().push_back(std::move(held_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Nothing is carried over from a smaller block.
  char* at_least(int64_t bytes) {
    if (held_.bytes < bytes) {
      held_.data.clear();  // before the new block is asked for: never both
      held_ = {c10::GetCPUAllocator()->allocate(bytes), bytes};
    }
    return static_cast<char*>(held_.data.get());
  }

 private:
  struct Block {
    c10::DataPtr data;
    int64_t bytes = 0;
  };
  Block held_;

  // In a call inside another the inner one lets go first, and both find their own again.
  static std::vector<Block>& kept() {
    thread_local std::vector<Block> blocks;
    return blocks;
  }
};

}  // namespace fr
