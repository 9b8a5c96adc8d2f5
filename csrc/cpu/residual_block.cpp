#include "../residual_block.h"

#include <torch/library.h>

#include "conv_bn_add_relu.h"

namespace fr {
namespace {

// `joined` is for devices that add two convolutions in one kernel.
at::Tensor residual_block_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                              at::TensorList shift, const OptionalTensor&, const OptionalTensor&,
                              bool bottleneck, int64_t stride, int64_t dilation, int64_t groups) {
  const Block block = take_apart(x, packed, scale, shift, bottleneck, stride, dilation, groups);
  return run_chain(
      block, x,
      [](const at::Tensor& input, const BlockConv& c, const OptionalTensor& residual, bool relu) {
        return conv_bn_add_relu_packed_cpu(input, c.packed, c.scale, c.shift, residual,
                                           c.weight_shape, c.stride, c.padding, c.dilation,
                                           c.groups, relu, false);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) { m.impl("residual_block", &residual_block_cpu); }

}  // namespace fr
