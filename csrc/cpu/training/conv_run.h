// What both directions of a training convolution share.
#pragma once

#include "../../tensor.h"
#include "../conv_bn_add_relu.h"
#include "../result_cache.h"
#include "filters.h"
#include "passes.h"

namespace fr {

// A weight laid out for a kernel, for the duration of the call. Its memory is from the result
// cache: what Winograd's algorithm reads of 512 channels takes 38 MB, which the maps leave free at
// that time.
class PackedWeight {
 public:
  using Bytes = int64_t (*)(const ConvShape&);
  using Pack = void (*)(const ConvShape&, const void*, int64_t, int64_t, void*);

  PackedWeight(const ConvShape& s, const Tensor& weight, ScalarType maps, Bytes bytes, Bytes units,
               Pack pack)
      : source_(filters_of(weight, maps)), memory_(std::max<int64_t>(bytes(s), 1)) {
    const int64_t count = units(s), numel = std::max<int64_t>(source_.numel(), 1);
    const int64_t grain = std::max<int64_t>(count * 16 * 1024 / numel, 1);
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      pack(s, source_.const_data_ptr(), begin, end, memory_.get());
    });
  }

  const void* data() const { return memory_.get(); }
  const void* source() const { return source_.const_data_ptr(); }

 private:
  Tensor source_;  // channels-last
  ResultMemory memory_;
};

// How many splits of a block occupy the threads best. A split costs about a twentieth of a block,
// for the operand that all splits of it transform.
inline int64_t splits_for(int64_t blocks, int64_t most, int64_t threads) {
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min(most, threads); ++splits) {
    const int64_t rounds = (blocks * splits + threads - 1) / threads;
    const double time = static_cast<double>(rounds) / splits * (1 + 0.05 * (splits - 1));
    if (splits > 1 && time >= least) continue;
    best = splits;
    least = time;
  }
  return best;
}

template <class Args>
void run_kernel(const BlockKernel<Args>& kernel, Args args) {
  const int64_t blocks = kernel.blocks(args.shape);
  const int64_t most = kernel.splits ? kernel.splits(args.shape) : 1;
  args.splits = splits_for(blocks, most, get_num_threads());
  for_blocks(blocks * args.splits, 1, kernel.scratch_bytes(args.shape),
             [&](int64_t unit, void* scratch) { kernel.run(args, unit, scratch); });
}

// activation(x * scale + shift), as a map.
inline Tensor normalized(const Tensor& x, const Tensor& scale, const Tensor& shift,
                         Activation activation) {
  const Tensor y = empty_map(x.sizes(), x.options());
  BlockEnd args{};
  args.channels = x.size(1);
  args.z = x.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.activation = activation;
  const auto kernel = training_kernels_of(x).block_end;
  for_rows(x, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace fr
