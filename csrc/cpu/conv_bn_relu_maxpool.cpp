#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "conv_bn_add_relu.h"
#include "layers.h"
#include "result_cache.h"

namespace fr {
namespace {

at::Tensor run(const char* op, ConvCall& call, at::IntArrayRef pool_kernel,
               at::IntArrayRef pool_stride, at::IntArrayRef pool_padding) {
  const ConvShape& s = call.args.shape;
  const PoolForward pool =
      checked_pool(op, {s.n, s.k, s.out_h(), s.out_w()}, pool_kernel, pool_stride, pool_padding);
  const at::Tensor y = empty_map({s.n, s.k, pool.out_h(), pool.out_w()}, call.x.options());
  run_on_thread_team([&](ThreadTeam& team) {
    run_conv_max_pool(team, call.dtype, call.args, pool, y.mutable_data_ptr());
  });
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
