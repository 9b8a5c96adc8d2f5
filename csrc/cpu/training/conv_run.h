// What both directions of a training convolution share.
#pragma once

#include <ATen/ATen.h>

#include "../conv_bn_add_relu.h"
#include "../result_cache.h"
#include "passes.h"

namespace fr {

// A weight laid out for a kernel, for as long as the call.
class PackedWeight {
 public:
  using Bytes = int64_t (*)(const ConvShape&);
  using Pack = void (*)(const ConvShape&, const void*, int64_t, int64_t, void*);

  PackedWeight(const ConvShape& s, const at::Tensor& weight, Bytes bytes, Bytes units, Pack pack) {
    data_ = memory_.at_least(std::max<int64_t>(bytes(s), 1));
    const at::Tensor source = weight.contiguous(kChannelsLast);
    const int64_t count = units(s), numel = std::max<int64_t>(source.numel(), 1);
    const int64_t grain = std::max<int64_t>(count * 16 * 1024 / numel, 1);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      pack(s, source.const_data_ptr(), begin, end, data_);
    });
  }

  const void* data() const { return data_; }

 private:
  Scratch memory_;
  char* data_;
};

template <class Args>
void run_kernel(const BlockKernel<Args>& kernel, const Args& args) {
  for_blocks(kernel.blocks(args.shape), 1, kernel.scratch_bytes(args.shape),
             [&](int64_t block, void* scratch) { kernel.run(args, block, scratch); });
}

// relu(x * scale + shift), as a map.
inline at::Tensor normalized(const at::Tensor& x, const at::Tensor& scale,
                             const at::Tensor& shift) {
  const at::Tensor y = empty_map(x.sizes(), x.options());
  BlockEnd args{};
  args.channels = x.size(1);
  args.z = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.relu = true;
  const auto kernel = training_kernels_of(x).block_end;
  for_rows(x, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace fr
