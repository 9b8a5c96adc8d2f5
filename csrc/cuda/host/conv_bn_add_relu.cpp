#include "conv_bn_add_relu.h"

#include <tuple>

#include "../../tensor.h"

namespace fr {

Tensor conv_bn_add_relu_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& conv_bias,
                             const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                             const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
                             IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                             int64_t groups, double eps, Activation activation) {
  ConvCall call("conv_bn_add_relu", x, weight.sizes(), {stride, padding, dilation, groups});
  call.set_weight(weight);
  call.set_batch_norm(conv_bias, bn_weight, bn_bias, mean, var, eps);
  call.set_residual(residual, std::nullopt, std::nullopt);
  call.set_activation(activation);
  return call.run().contiguous(x.suggest_memory_format());
}

// The last argument, whether Winograd's algorithm may run, is for the CPU.
Tensor conv_bn_add_relu_packed_cuda(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                    const Tensor& shift, const OptionalTensor& residual,
                                    IntArrayRef weight_shape, IntArrayRef stride,
                                    IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                    Activation activation, bool) {
  ConvCall call("conv_bn_add_relu_packed", x, weight_shape, {stride, padding, dilation, groups});
  call.set_packed(packed);
  call.set_affine(scale, shift);
  call.set_residual(residual, std::nullopt, std::nullopt);
  call.set_activation(activation);
  return call.run();
}

namespace {

Tensor conv_conv_add_relu_packed_cuda(const Tensor& x, const Tensor& x2, const Tensor& packed,
                                      const Tensor& shift, IntArrayRef weight_shape,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                      IntArrayRef stride2, Activation activation) {
  ConvCall call("conv_conv_add_relu_packed", x, weight_shape, {stride, padding, dilation, 1});
  call.set_second(x2, stride2);
  call.set_packed(packed);
  call.set_affine(std::nullopt, shift);
  call.set_activation(activation);
  FR_CHECK_VALUE(call.by_packs(),
                 "conv_conv_add_relu_packed: x, x2: expected channels and "
                 "addresses in multiples of 16 bytes, got ",
                 x.sizes(), " and ", x2.sizes());
  return call.run();
}

Tensor conv_bn_add_relu_planned_cuda(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                     const Tensor& shift, const OptionalTensor& residual,
                                     const OptionalTensor& residual_scale,
                                     const OptionalTensor& residual_shift, IntArrayRef weight_shape,
                                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                     int64_t groups, Activation activation, int64_t tile,
                                     int64_t split_k) {
  ConvCall call("conv_bn_add_relu_planned", x, weight_shape, {stride, padding, dilation, groups});
  call.set_packed(packed);
  call.set_affine(scale, shift);
  call.set_residual(residual, residual_scale, residual_shift);
  call.set_activation(activation);
  call.set_plan(tile, split_k);
  return call.run();
}

std::tuple<Tensor, Tensor, Tensor> conv_statistics_cuda(const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& conv_bias,
                                                        IntArrayRef stride, IntArrayRef padding,
                                                        IntArrayRef dilation, int64_t groups) {
  ConvCall call("conv_statistics", x, weight.sizes(), {stride, padding, dilation, groups});
  call.set_weight(weight);
  call.set_affine(std::nullopt, conv_bias);
  const std::vector<Tensor> results = call.run_with_statistics();
  return {results[0].contiguous(x.suggest_memory_format()), results[1], results[2]};
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("conv_bn_add_relu", FR_BOX(conv_bn_add_relu_cuda));
  m.impl("conv_bn_add_relu_packed", FR_BOX(conv_bn_add_relu_packed_cuda));
  m.impl("conv_bn_add_relu_planned", FR_BOX(conv_bn_add_relu_planned_cuda));
  m.impl("conv_statistics", FR_BOX(conv_statistics_cuda));
  m.impl("conv_conv_add_relu_packed", FR_BOX(conv_conv_add_relu_packed_cuda));
}

}  // namespace fr
