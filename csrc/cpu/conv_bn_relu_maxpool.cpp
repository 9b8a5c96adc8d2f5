
#include "../box.h"
#include "../checks.h"
#include "../tensor.h"
#include "conv_bn_add_relu.h"
#include "layers.h"
#include "result_cache.h"

namespace fr {
namespace {

Tensor run(const char* op, ConvCall& call, IntArrayRef pool_kernel, IntArrayRef pool_stride,
           IntArrayRef pool_padding) {
  const ConvShape& s = call.args.shape;
  const PoolForward pool =
      checked_pool(op, {s.n, s.k, s.out_h(), s.out_w()}, pool_kernel, pool_stride, pool_padding);
  const Tensor y = empty_map({s.n, s.k, pool.out_h(), pool.out_w()}, call.x.options());
  run_on_thread_team([&](ThreadTeam& team) {
    run_conv_max_pool(team, call.dtype, call.args, pool, y.mutable_data_ptr());
  });
  return y;
}

Tensor conv_bn_relu_maxpool_cpu(const Tensor& x, const Tensor& weight,
                                const OptionalTensor& conv_bias, const OptionalTensor& bn_weight,
                                const OptionalTensor& bn_bias, const Tensor& mean,
                                const Tensor& var, IntArrayRef stride, IntArrayRef padding,
                                IntArrayRef dilation, int64_t groups, double eps,
                                IntArrayRef pool_kernel, IntArrayRef pool_stride,
                                IntArrayRef pool_padding, Activation activation) {
  const char* op = "conv_bn_relu_maxpool";
  ConvCall call = prepare(op, x, weight, conv_bias, bn_weight, bn_bias, mean, var, std::nullopt,
                          {stride, padding, dilation, groups}, eps, activation);
  return run(op, call, pool_kernel, pool_stride, pool_padding)
      .contiguous(x.suggest_memory_format());
}

Tensor conv_bn_relu_maxpool_packed_cpu(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                       const Tensor& shift, IntArrayRef weight_shape,
                                       IntArrayRef stride, IntArrayRef padding,
                                       IntArrayRef dilation, int64_t groups,
                                       IntArrayRef pool_kernel, IntArrayRef pool_stride,
                                       IntArrayRef pool_padding, Activation activation) {
  const char* op = "conv_bn_relu_maxpool_packed";
  ConvCall call = prepare_packed(op, x, packed, scale, shift, std::nullopt, weight_shape,
                                 {stride, padding, dilation, groups}, activation);
  return run(op, call, pool_kernel, pool_stride, pool_padding);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv_bn_relu_maxpool", FR_BOX(conv_bn_relu_maxpool_cpu));
  m.impl("conv_bn_relu_maxpool_packed", FR_BOX(conv_bn_relu_maxpool_packed_cpu));
}

}  // namespace fr
