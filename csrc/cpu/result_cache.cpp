#include "result_cache.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#ifdef __linux__
#include <unistd.h>
#endif

#include "conv_bn_add_relu.h"

namespace fr {
namespace {

// Smaller blocks the C library keeps by itself.
constexpr size_t kLeastKept = 64 * 1024;

// Results over which the most that was in use is looked for, once and once more.
constexpr int64_t kWindow = 1024;

size_t quarter_of_memory() {
#ifdef __linux__
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 4 *
         static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
#else
  return size_t{1} << 30;
#endif
}

struct Block {
  c10::DataPtr data;
  size_t bytes;
};

class ResultCache final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Block{take(bytes), bytes});
    void* data = block->data.get();
    return {data, block.release(), &let_go, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  void release() {
    std::deque<Block> blocks;  // freed behind the lock
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
  std::deque<Block> free_;  // the longest unused first
  size_t kept_ = 0, in_use_ = 0;
  size_t most_ = 0, most_before_ = 0;  // in use at one time, in this window and the one before
  int64_t results_ = 0;                // in this window
  const size_t bound_ = quarter_of_memory();

  c10::DataPtr take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      note(bytes);
      for (auto at = free_.rbegin(); at != free_.rend(); ++at) {
        if (at->bytes != bytes) continue;
        c10::DataPtr data = std::move(at->data);
        free_.erase(std::next(at).base());
        kept_ -= bytes;
        return data;
      }
      trim();
    }
    return c10::GetCPUAllocator()->allocate(bytes);
  }

  void note(size_t bytes) {
    in_use_ += bytes;
    if (++results_ > kWindow) {
      results_ = 0;
      most_before_ = most_;
      most_ = 0;
    }
    most_ = std::max(most_, in_use_);
  }

  void trim() {
    const size_t most = std::max(most_, most_before_);
    const size_t limit = std::min(most - std::min(most, in_use_), bound_);
    while (kept_ > limit) {
      kept_ -= free_.front().bytes;
      free_.pop_front();
    }
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.bytes;
    kept_ += block.bytes;
    free_.push_back(std::move(block));
    trim();
  }

  static void let_go(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    instance().give(std::move(*block));
  }
};

}  // namespace

at::Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kLeastKept) return at::empty(sizes, options, kChannelsLast);
  return at::detail::empty_generic(sizes, &ResultCache::instance(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), kChannelsLast);
}

c10::DataPtr result_memory(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes);
  if (size < kLeastKept) return c10::GetCPUAllocator()->allocate(size);
  return ResultCache::instance().allocate(size);
}

void release_results() { ResultCache::instance().release(); }

int64_t kept_result_bytes() { return static_cast<int64_t>(ResultCache::instance().kept()); }

}  // namespace fr
