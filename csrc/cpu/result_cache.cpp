#include "result_cache.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <unistd.h>
#endif

#include "conv_bn_add_relu.h"

namespace fr {
namespace {

// The C library keeps smaller blocks by itself.
constexpr size_t kLeastKept = 64 * 1024;

// Kept in any case: the maps of one image, of a dozen sizes, are more in all than are in use at one
// time, and the system clears each that was evicted when it is needed again.
constexpr size_t kAlwaysKept = 32 * 1024 * 1024;

// The peak of use is taken over a window of this many results and the window before it.
constexpr int64_t kWindow = 1024;

size_t quarter_of_memory() {
#ifdef __linux__
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 4 *
         static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
#else
  return size_t{1} << 30;
#endif
}

struct MemoryBlock {
  Memory data;
  size_t bytes;
};

class ResultCache {
 public:
  Memory take(size_t bytes) {
    std::vector<Memory> old;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      note(bytes);
      for (auto at = free_.rbegin(); at != free_.rend(); ++at) {
        if (at->bytes != bytes) continue;
        Memory data = std::move(at->data);
        free_.erase(std::next(at).base());
        kept_ -= bytes;
        return data;
      }
      trim(old);
    }
    Memory data = allocate_from(old, bytes);
    keep_rest(std::move(old));
    return data;
  }

  void give(MemoryBlock block) {
    std::vector<Memory> old;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.bytes;
    kept_ += block.bytes;
    free_.push_back(std::move(block));
    trim(old);
  }

  void release() {
    std::deque<MemoryBlock> blocks;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks.swap(free_);
    kept_ = 0;
  }

  size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

  static ResultCache& instance() {
    static ResultCache* const cache = new ResultCache;  // never destroyed: tensors outlive main
    return *cache;
  }

 private:
  std::mutex mutex_;
  std::deque<MemoryBlock> free_;  // the longest unused first
  size_t kept_ = 0, in_use_ = 0;
  size_t most_ = 0, most_before_ = 0;  // in use at one time, in this window and the one before
  int64_t results_ = 0;                // in this window
  const size_t bound_ = quarter_of_memory();

  void note(size_t bytes) {
    in_use_ += bytes;
    if (++results_ > kWindow) {
      results_ = 0;
      most_before_ = most_;
      most_ = 0;
    }
    most_ = std::max(most_, in_use_);
  }

  // Moves what may not be kept to `old`.
  void trim(std::vector<Memory>& old) {
    while (kept_ > limit()) {
      kept_ -= free_.front().bytes;
      old.push_back(std::move(free_.front().data));
      free_.pop_front();
    }
  }

  size_t limit() const {
    const size_t most = std::max({most_, most_before_, kAlwaysKept});
    return std::min(most - std::min(most, in_use_), bound_);
  }

  // Keeps what is left of blocks that gave pages to another one, as the first to be evicted.
  void keep_rest(std::vector<Memory> old) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Memory& rest : old) {
      const size_t bytes = rest ? rest.get_deleter().mapped : 0;
      if (bytes == 0 || kept_ + bytes > limit()) continue;
      kept_ += bytes;
      free_.push_front({std::move(rest), bytes});
    }
  }
};

// Called when the last tensor that uses a block's memory is gone.
void let_go(void*, void* context) {
  const std::unique_ptr<MemoryBlock> block(static_cast<MemoryBlock*>(context));
  ResultCache::instance().give(std::move(*block));
}

}  // namespace

Tensor empty_map(IntArrayRef sizes, IntArrayRef strides, const Options& options) {
  auto bytes = static_cast<size_t>(element_size(options.type));
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kLeastKept) return empty_strided(sizes, strides, options);
  auto block =
      std::make_unique<MemoryBlock>(MemoryBlock{ResultCache::instance().take(bytes), bytes});
  char* const data = block->data.get();
  return from_memory(data, sizes, strides, options.type, &let_go, block.release());
}

Tensor empty_map(IntArrayRef sizes, const Options& options) {
  return empty_map(sizes, dense_strides(sizes, kChannelsLast), options);
}

ResultMemory::ResultMemory(int64_t bytes)
    : data_(static_cast<size_t>(bytes) < kLeastKept
                ? allocate(static_cast<size_t>(bytes))
                : ResultCache::instance().take(static_cast<size_t>(bytes))),
      bytes_(static_cast<size_t>(bytes)) {}

ResultMemory::~ResultMemory() {
  if (bytes_ >= kLeastKept) ResultCache::instance().give({std::move(data_), bytes_});
}

void release_results() { ResultCache::instance().release(); }

int64_t kept_result_bytes() { return static_cast<int64_t>(ResultCache::instance().kept()); }

}  // namespace fr
