#include "../residual_block.h"

#include "../../residual_block.h"
#include "../../tensor.h"
#include "conv_bn_add_relu.h"

namespace fr {
namespace {

Tensor run_conv(const Tensor& x, const BlockConv& c, const OptionalTensor& residual,
                Activation activation) {
  return conv_bn_add_relu_packed_cuda(x, c.packed, c.scale, c.shift, residual, c.weight_shape,
                                      c.stride, c.padding, c.dilation, c.groups, activation, false);
}

// The last two convolutions of a bottleneck: one kernel that keeps the map between them on chip if
// it supports the channels, else two.
Tensor run_end(const Tensor& x, const BlockConv& first, const BlockConv& second,
               const Tensor& residual, Activation activation) {
  ConvCall call("residual_block", x, first.weight_shape,
                {first.stride, first.padding, first.dilation, first.groups});
  call.set_packed(first.packed);
  call.set_affine(first.scale, first.shift);
  call.set_activation(activation);
  const Tensor y = call.run_then_1x1(second.packed, second.scale, second.shift, residual);
  if (y.defined()) return y;
  return run_conv(run_conv(x, first, std::nullopt, activation), second, residual, activation);
}

Tensor run_basic(const Tensor& x, const Block& block, Activation activation) {
  const Tensor residual =
      block.shortcut ? run_conv(x, *block.shortcut, std::nullopt, Activation::kNone) : x;
  const Tensor h = run_conv(x, block.convs[0], std::nullopt, activation);
  return run_conv(h, block.convs[1], residual, activation);
}

// The argument without a name, whether Winograd's algorithm may run, is for the CPU.
Tensor residual_block_cuda(const Tensor& x, TensorList packed, TensorList scale, TensorList shift,
                           const OptionalTensor& concatenated,
                           const OptionalTensor& concatenated_shift, bool bottleneck,
                           int64_t stride, int64_t dilation, int64_t groups, bool,
                           Activation activation) {
  check_map("residual_block", "x", x);
  const Block block =
      decompose(x.size(1), packed, scale, shift, bottleneck, stride, dilation, groups);
  const std::vector<BlockConv>& convs = block.convs;
  if (concatenated && concatenated_shift && block.shortcut) {
    Tensor h = x;
    for (size_t i = 0; i + 1 < convs.size(); ++i)
      h = run_conv(h, convs[i], std::nullopt, activation);
    const BlockConv& last = convs.back();
    ConvCall call("residual_block", h, last.weight_shape,
                  {last.stride, last.padding, last.dilation, last.groups});
    call.set_second(x, block.shortcut->stride);
    call.set_packed(*concatenated);
    call.set_affine(std::nullopt, concatenated_shift);
    call.set_activation(activation);
    if (call.by_packs()) return call.run();
    return run_conv(h, last, run_conv(x, *block.shortcut, std::nullopt, Activation::kNone),
                    activation);
  }
  if (!bottleneck) return run_basic(x, block, activation);
  const Tensor residual =
      block.shortcut ? run_conv(x, *block.shortcut, std::nullopt, Activation::kNone) : x;
  return run_end(run_conv(x, convs[0], std::nullopt, activation), convs[1], convs[2], residual,
                 activation);
}

}  // namespace

FR_CUDA_LIBRARY(m) { m.impl("residual_block", FR_BOX(residual_block_cuda)); }

}  // namespace fr
