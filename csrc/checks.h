// Argument checks of the compiled operators. Messages name the operation, the argument, what was
// expected and what came. These checks cover memory safety; fused_resnet/checks.py checks the same
// and more before it calls an operator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "conv_shape.h"

namespace fr {

inline void check_map(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": ", name, ": expected 4 dimensions (N, C, H, W), got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                       x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   op, ": ", name, ": expected dtype float32, float64, bfloat16 or float16, got ",
                   x.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& t,
                         const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, ": expected device ",
                    like.device(), ", got ", t.device());
}

// `v` has one element per channel and is on the device of `like`.
inline void check_vector(const char* op, const char* name, const std::optional<at::Tensor>& v,
                         int64_t channels, const at::Tensor& like) {
  if (!v.has_value()) return;
  TORCH_CHECK_VALUE(v->dim() == 1 && v->size(0) == channels, op, ": ", name, ": expected shape [",
                    channels, "], got ", v->sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(v->scalar_type()), op, ": ", name,
                   ": expected a floating-point dtype, got ", v->scalar_type());
  check_device(op, name, *v, like);
}

// `t` has shape `shape`, and the dtype and device of `like`.
inline void check_same(const char* op, const char* name, const std::optional<at::Tensor>& t,
                       at::IntArrayRef shape, const at::Tensor& like) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->sizes() == shape, op, ": ", name, ": expected shape ", shape, ", got ",
                    t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == like.scalar_type(), op, ": ", name, ": expected dtype ",
                   like.scalar_type(), ", got ", t->scalar_type());
  check_device(op, name, *t, like);
}

inline void check_pair(const char* op, const char* name, at::IntArrayRef v, int64_t least) {
  TORCH_CHECK_VALUE(v.size() == 2 && v[0] >= least && v[1] >= least, op, ": ", name,
                    ": expected two ints >= ", least, ", got ", v);
}

// The checked sizes of a convolution of x with a weight of shape `weight`.
inline ConvShape conv_shape(const char* op, const at::Tensor& x, at::IntArrayRef weight,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups) {
  check_map(op, "x", x);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  TORCH_CHECK_VALUE(
      weight.size() == 4 && weight[0] > 0 && weight[1] > 0 && weight[2] > 0 && weight[3] > 0, op,
      ": weight: expected 4 positive sizes (K, C / groups, kh, kw), got ", weight);
  TORCH_CHECK_VALUE(groups >= 1 && weight[0] % groups == 0, op,
                    ": groups: expected a divisor of the ", weight[0], " output channels, got ",
                    groups);
  TORCH_CHECK_VALUE(x.size(1) == weight[1] * groups, op, ": x: expected ", weight[1] * groups,
                    " channels, got ", x.size(1));
  const ConvShape s{x.size(0),  x.size(2),   x.size(3),   x.size(1), weight[0],
                    weight[2],  weight[3],   stride[0],   stride[1], padding[0],
                    padding[1], dilation[0], dilation[1], groups};
  TORCH_CHECK_VALUE(s.h + 2 * s.pad_h >= s.dilation_h * (s.kh - 1) + 1 &&
                        s.w + 2 * s.pad_w >= s.dilation_w * (s.kw - 1) + 1,
                    op, ": x: expected a map at least as large as the dilated kernel, got ",
                    x.sizes(), " for weight ", weight);
  return s;
}

// Checks a max-pool that follows a convolution of shape `s`.
inline void check_pool(const char* op, const ConvShape& s, at::IntArrayRef kernel,
                       at::IntArrayRef stride, at::IntArrayRef padding) {
  check_pair(op, "pool_kernel", kernel, 1);
  check_pair(op, "pool_stride", stride, 1);
  check_pair(op, "pool_padding", padding, 0);
  TORCH_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1], op,
                    ": pool_padding: expected at most half of pool_kernel ", kernel, ", got ",
                    padding);
  TORCH_CHECK_VALUE(
      s.out_h() + 2 * padding[0] >= kernel[0] && s.out_w() + 2 * padding[1] >= kernel[1], op,
      ": pool_kernel: expected at most the padded map of ", s.out_h(), " x ", s.out_w(), ", got ",
      kernel);
}

// Checks the arguments of bn_add_relu, on any device.
inline void check_bn(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& running_mean,
                     const std::optional<at::Tensor>& running_var,
                     const std::optional<at::Tensor>& residual, bool training) {
  check_map(op, "x", x);
  const int64_t channels = x.size(1);
  check_vector(op, "weight", weight, channels, x);
  check_vector(op, "bias", bias, channels, x);
  check_vector(op, "running_mean", running_mean, channels, x);
  check_vector(op, "running_var", running_var, channels, x);
  check_same(op, "residual", residual, x.sizes(), x);
  TORCH_CHECK_VALUE(training || (running_mean && running_var), op,
                    ": running_mean, running_var: expected tensors when not training, got None");
}

// Checks the arguments of bn_add_relu_backward, on any device.
inline void check_bn_backward(const char* op, const at::Tensor& grad, const at::Tensor& x,
                              const std::optional<at::Tensor>& y,
                              const std::optional<at::Tensor>& weight, const at::Tensor& mean,
                              const at::Tensor& var, bool relu) {
  check_map(op, "x", x);
  const int64_t channels = x.size(1);
  check_same(op, "grad", grad, x.sizes(), x);
  check_same(op, "y", y, x.sizes(), x);
  check_vector(op, "weight", weight, channels, x);
  check_vector(op, "mean", mean, channels, x);
  check_vector(op, "var", var, channels, x);
  TORCH_CHECK_VALUE(y || !relu, op, ": y: expected a tensor when relu=True, got None");
}

}  // namespace fr
