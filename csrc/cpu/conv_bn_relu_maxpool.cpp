#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "conv_bn_add_relu.h"
#include "result_cache.h"

namespace fr {
namespace {

PoolForward pool_shape(const char* op, const ConvShape& s, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding) {
  check_pool(op, s, kernel, stride, padding);
  PoolForward p{};
  p.h = s.out_h();
  p.w = s.out_w();
  p.c = s.k;
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  // Strides beyond the padded map are normalised, as in conv_shape.
  p.stride_h = std::min(stride[0], p.h + 2 * padding[0]);
  p.stride_w = std::min(stride[1], p.w + 2 * padding[1]);
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  return p;
}

at::Tensor run(const char* op, ConvCall& call, at::IntArrayRef pool_kernel,
               at::IntArrayRef pool_stride, at::IntArrayRef pool_padding) {
  const ConvShape& s = call.args.shape;
  const PoolForward pool = pool_shape(op, s, pool_kernel, pool_stride, pool_padding);
  const at::Tensor y = empty_map({s.n, s.k, pool.out_h(), pool.out_w()}, call.x.options());
  run_conv_max_pool(call.dtype, call.args, pool, y.mutable_data_ptr());
  return y;
}

at::Tensor conv_bn_relu_maxpool_cpu(const at::Tensor& x, const at::Tensor& weight,
                                    const OptionalTensor& conv_bias,
                                    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                    const at::Tensor& mean, const at::Tensor& var,
                                    at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation, int64_t groups, double eps,
                                    at::IntArrayRef pool_kernel, at::IntArrayRef pool_stride,
                                    at::IntArrayRef pool_padding) {
  const char* op = "conv_bn_relu_maxpool";
  ConvCall call = prepare(op, x, weight, conv_bias, bn_weight, bn_bias, mean, var, std::nullopt,
                          {stride, padding, dilation, groups}, eps, true);
  return run(op, call, pool_kernel, pool_stride, pool_padding)
      .contiguous(x.suggest_memory_format());
}

at::Tensor conv_bn_relu_maxpool_packed_cpu(const at::Tensor& x, const at::Tensor& packed,
                                           const at::Tensor& scale, const at::Tensor& shift,
                                           at::IntArrayRef weight_shape, at::IntArrayRef stride,
                                           at::IntArrayRef padding, at::IntArrayRef dilation,
                                           int64_t groups, at::IntArrayRef pool_kernel,
                                           at::IntArrayRef pool_stride,
                                           at::IntArrayRef pool_padding) {
  const char* op = "conv_bn_relu_maxpool_packed";
  ConvCall call = prepare_packed(op, x, packed, scale, shift, std::nullopt, weight_shape,
                                 {stride, padding, dilation, groups}, true);
  return run(op, call, pool_kernel, pool_stride, pool_padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv_bn_relu_maxpool", &conv_bn_relu_maxpool_cpu);
  m.impl("conv_bn_relu_maxpool_packed", &conv_bn_relu_maxpool_packed_cpu);
}

}  // namespace fr
