#include "map_pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "conv_bn_add_relu.h"

namespace fr {
namespace {

// What is kept at most: the maps of one image on its way through any ResNet, and of some images in
// its late stages.
constexpr size_t kPooledBytes = 64 * 1024 * 1024;

// Smaller blocks the C library keeps by itself.
constexpr size_t kLeastPooled = 64 * 1024;

struct Block {
  c10::DataPtr data;
  size_t bytes;
};

class MapPool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Block{take(bytes), bytes});
    void* data = block->data.get();
    return {data, block.release(), &let_go, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  static MapPool& instance() {
    static MapPool* const pool = new MapPool;  // never destroyed: tensors may outlive main
    return *pool;
  }

 private:
  std::mutex mutex_;
  std::deque<Block> free_;  // the longest unused first
  size_t held_ = 0;

  c10::DataPtr take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = free_.rbegin(); at != free_.rend(); ++at) {
        if (at->bytes != bytes) continue;
        c10::DataPtr data = std::move(at->data);
        free_.erase(std::next(at).base());
        held_ -= bytes;
        return data;
      }
    }
    return c10::GetCPUAllocator()->allocate(bytes);
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ += block.bytes;
    free_.push_back(std::move(block));
    while (held_ > kPooledBytes) {
      held_ -= free_.front().bytes;
      free_.pop_front();
    }
  }

  static void let_go(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    instance().give(std::move(*block));
  }
};

}  // namespace

at::Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kLeastPooled) return at::empty(sizes, options, kChannelsLast);
  return at::detail::empty_generic(sizes, &MapPool::instance(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), kChannelsLast);
}

}  // namespace fr
