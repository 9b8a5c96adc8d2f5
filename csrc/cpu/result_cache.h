// Feature maps whose memory is kept: memory that one step of a network releases is reused for the
// next result of the same size.
//
// Why: the C library gives large blocks back to the system, which clears every page before it hands
// it out again. For a map of 51 MB that costs 20 ms, more than the convolution that writes it; in a
// ResNet-50 that is a tenth of an inference's time and 2 to 8% of a training step's.
//
// Large ones are mapped one by one (memory.h).
//
// How much: free memory is kept for as long as it and the results in use together do not exceed the
// recent peak of use (over the last thousand to two thousand results) or 32 MiB, so that no process
// holds more than it needed anyway; and it is at most a quarter of the machine's memory. A step of
// ResNet-50 at batch 16 and 224x224 keeps 1.1 GB for the next one. A map of a size that is not in
// the cache is made of the pages of the blocks that are evicted for it. release_results gives all
// of it back.
//
// Such a result can't grow in place (resize_): LibTorch's stable interface wraps memory that the
// caller owns, but takes no allocator.
#pragma once

#include "../tensor.h"
#include "memory.h"

namespace fr {

// An uninitialised channels-last map. When the last tensor that uses it is gone, its memory is kept
// for the next map of the same size. Thread-safe.
Tensor empty_map(IntArrayRef sizes, const Options& options);

// The same with the given strides, which must leave no gap.
Tensor empty_map(IntArrayRef sizes, IntArrayRef strides, const Options& options);

// Uninitialised memory for maps that no tensor holds, kept likewise.
class ResultMemory {
 public:
  explicit ResultMemory(int64_t bytes);
  ~ResultMemory();
  ResultMemory(const ResultMemory&) = delete;
  ResultMemory& operator=(const ResultMemory&) = delete;

  char* get() const { return data_.get(); }

 private:
  Memory data_;
  const size_t bytes_;
};

// Gives free memory back to the system.
void release_results();

// Bytes of free memory that are kept.
int64_t kept_result_bytes();

}  // namespace fr
