// Temporary memory of a call, which the thread keeps for its next call.
#pragma once

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "memory.h"

namespace fr {

// The largest block that a thread keeps for each of the Scratch objects it has at a time. Larger
// blocks are freed when the call ends.
constexpr int64_t kKeptBytes = 16 * 1024 * 1024;

class Scratch {
 public:
  Scratch() {
    if (kept().empty()) return;
    held_ = std::move(kept().back());
    kept().pop_back();
  }
  ~Scratch() {
    if (held_.bytes == 0 || held_.bytes > kKeptBytes) return;
    try {
      kept().push_back(std::move(held_));
    } catch (const std::bad_alloc&) {  // then the block is freed, as a destructor must not throw
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` bytes, whose contents are undefined.
  char* at_least(int64_t bytes) {
    if (held_.bytes < bytes) {
      held_ = MemoryBlock();  // before the allocation, so that both blocks never exist at once
      Memory data = allocate(static_cast<size_t>(bytes));
      held_ = {std::move(data), bytes};  // only now, as the allocation may throw
    }
    return held_.data.get();
  }

 private:
  struct MemoryBlock {
    Memory data;
    int64_t bytes = 0;
  };
  MemoryBlock held_;

  // A stack: nested calls return their blocks in reverse order, so each finds its own again.
  static std::vector<MemoryBlock>& kept() {
    thread_local std::vector<MemoryBlock> blocks;
    return blocks;
  }
};

}  // namespace fr
