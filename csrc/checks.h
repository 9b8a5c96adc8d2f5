// Argument checks of the compiled operators. Messages name the operation, the argument, what was
// expected and what came. These checks cover memory safety; fused_resnet/ops/checks.py checks the
// same and more before it calls an operator.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <optional>

#include "activation.h"
#include "conv_shape.h"
#include "tensor.h"

namespace fr {

// Limits of a convolution and of its pooling. Every size, stride, padding, dilation and number of
// groups is less than 2^31, and every array that is made of them, padding included, has at most
// 2^56 elements. Then no sum and no product of them overflows 64 bits, here or in a kernel; what
// does not fit the memory fails in its allocation.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxNumel = int64_t{1} << 56;

inline void check_size(const char* op, const char* name, int64_t size, int64_t least) {
  FR_CHECK_VALUE(size >= least && size <= kMaxSize, op, ": ", name, ": expected an int from ",
                 least, " to ", kMaxSize, ", got ", size);
}

// The product of the sizes of an array is at most kMaxNumel.
inline void check_numel(const char* op, const char* name, std::initializer_list<int64_t> sizes) {
  int64_t numel = 1;
  for (const int64_t size : sizes) {
    const bool overflows = __builtin_mul_overflow(numel, size, &numel);
    FR_CHECK_VALUE(!overflows && numel <= kMaxNumel, op, ": ", name,
                   ": expected at most 2^56 elements, padding included, got sizes ",
                   IntArrayRef(sizes));
  }
}

// The tensor exists and its storage covers its sizes and strides. A storage may have been resized
// or freed since the tensor was made, as sharded training does.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  FR_CHECK_VALUE(t.defined(), op, ": ", name, ": expected a tensor, got an undefined one");
  FR_CHECK_TYPE(t.layout() == Layout::Strided, op, ": ", name, ": expected a dense tensor, got ",
                t.layout());
  if (t.numel() == 0) return;
  const IntArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t elements = t.storage_offset() + 1;
  for (size_t i = 0; i < sizes.size(); ++i) elements += (sizes[i] - 1) * strides[i];
  const auto needed = static_cast<size_t>(elements * t.element_size());
  FR_CHECK_VALUE(t.storage_nbytes() >= needed, op, ": ", name, ": expected a storage of at least ",
                 needed, " bytes for sizes ", sizes, " and strides ", strides, ", got one of ",
                 t.storage_nbytes(), " bytes");
}

inline void check_map(const char* op, const char* name, const Tensor& x) {
  check_storage(op, name, x);
  FR_CHECK_VALUE(x.dim() == 4, op, ": ", name, ": expected 4 dimensions (N, C, H, W), got ",
                 x.sizes());
  FR_CHECK_TYPE(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double ||
                    x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                op, ": ", name, ": expected dtype float32, float64, bfloat16 or float16, got ",
                x.scalar_type());
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FR_CHECK_VALUE(t.device() == like.device(), op, ": ", name, ": expected device ", like.device(),
                 ", got ", t.device());
}

// `v` has one element per channel and is on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& v, int64_t channels,
                         const Tensor& like) {
  check_storage(op, name, v);
  FR_CHECK_VALUE(v.dim() == 1 && v.size(0) == channels, op, ": ", name, ": expected shape [",
                 channels, "], got ", v.sizes());
  FR_CHECK_TYPE(is_floating_type(v.scalar_type()), op, ": ", name,
                ": expected a floating-point dtype, got ", v.scalar_type());
  check_device(op, name, v, like);
}
inline void check_vector(const char* op, const char* name, const OptionalTensor& v,
                         int64_t channels, const Tensor& like) {
  if (v.has_value()) check_vector(op, name, *v, channels, like);
}

// `t` has shape `shape`, and the dtype and device of `like`.
inline void check_same(const char* op, const char* name, const Tensor& t, IntArrayRef shape,
                       const Tensor& like) {
  check_storage(op, name, t);
  FR_CHECK_VALUE(t.sizes().equals(shape), op, ": ", name, ": expected shape ", shape, ", got ",
                 t.sizes());
  FR_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, ": expected dtype ",
                like.scalar_type(), ", got ", t.scalar_type());
  check_device(op, name, t, like);
}
inline void check_same(const char* op, const char* name, const OptionalTensor& t, IntArrayRef shape,
                       const Tensor& like) {
  if (t.has_value()) check_same(op, name, *t, shape, like);
}

inline void check_pair(const char* op, const char* name, IntArrayRef v, int64_t least) {
  FR_CHECK_VALUE(v.size() == 2 && std::min(v[0], v[1]) >= least && std::max(v[0], v[1]) <= kMaxSize,
                 op, ": ", name, ": expected two ints from ", least, " to ", kMaxSize, ", got ", v);
}

// The checked sizes of a weight of shape (K, C / groups, kh, kw); all others are zero.
inline ConvShape weight_shape(const char* op, IntArrayRef weight, int64_t groups) {
  FR_CHECK_VALUE(weight.size() == 4 && *std::min_element(weight.begin(), weight.end()) > 0 &&
                     *std::max_element(weight.begin(), weight.end()) <= kMaxSize,
                 op, ": weight: expected 4 positive sizes (K, C / groups, kh, kw) below 2^31, got ",
                 weight);
  FR_CHECK_VALUE(groups >= 1 && weight[0] % groups == 0, op, ": groups: expected a divisor of the ",
                 weight[0], " output channels, got ", groups);
  check_numel(op, "weight", {weight[0], weight[1], weight[2], weight[3]});
  ConvShape s{};
  s.k = weight[0];
  s.c = weight[1] * groups;
  s.kh = weight[2];
  s.kw = weight[3];
  s.groups = groups;
  return s;
}

// The checked sizes of a convolution of a map of shape `input` (N, C, H, W) with a weight of shape
// `weight`. Numbers that have no effect are normalised: strides beyond the padded map, and the
// dilation of a kernel of size one.
inline ConvShape conv_shape(const char* op, IntArrayRef input, IntArrayRef weight,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                            int64_t groups) {
  FR_CHECK_VALUE(input.size() == 4, op, ": x: expected 4 dimensions (N, C, H, W), got ", input);
  for (const int64_t size : input) check_size(op, "x", size, 0);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  ConvShape s = weight_shape(op, weight, groups);
  FR_CHECK_VALUE(input[1] == s.c, op, ": x: expected ", s.c, " channels, got ", input[1]);
  s.n = input[0];
  s.h = input[2];
  s.w = input[3];
  s.pad_h = padding[0];
  s.pad_w = padding[1];
  s.dilation_h = s.kh == 1 ? 1 : dilation[0];
  s.dilation_w = s.kw == 1 ? 1 : dilation[1];
  const int64_t rows = s.h + 2 * s.pad_h, cols = s.w + 2 * s.pad_w;
  FR_CHECK_VALUE(rows >= s.dilation_h * (s.kh - 1) + 1 && cols >= s.dilation_w * (s.kw - 1) + 1, op,
                 ": x: expected a map at least as large as the dilated kernel, got ", input,
                 " for weight ", weight);
  s.stride_h = std::min(stride[0], rows);
  s.stride_w = std::min(stride[1], cols);
  check_numel(op, "x", {s.c, rows, cols, s.n});
  check_numel(op, "x", {s.c, s.kw, rows, s.out_w(), s.n});  // copied column by column
  check_numel(op, "result", {s.k, s.out_h(), s.out_w(), s.n});
  return s;
}
inline ConvShape conv_shape(const char* op, const Tensor& x, IntArrayRef weight, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_map(op, "x", x);
  return conv_shape(op, x.sizes(), weight, stride, padding, dilation, groups);
}

// Checks a pool of a map of these sizes (N, C, H, W), which has pixels. In ceil_mode a window may
// reach beyond the padded map, by less than a stride.
inline void check_pool(const char* op, std::array<int64_t, 4> map, IntArrayRef kernel,
                       IntArrayRef stride, IntArrayRef padding, bool ceil_mode = false) {
  check_pair(op, "pool_kernel", kernel, 1);
  check_pair(op, "pool_stride", stride, 1);
  check_pair(op, "pool_padding", padding, 0);
  FR_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1], op,
                 ": pool_padding: expected at most half of pool_kernel ", kernel, ", got ",
                 padding);
  const auto [n, c, h, w] = map;
  const int64_t rows = h + 2 * padding[0], cols = w + 2 * padding[1];
  const int64_t more_rows = ceil_mode ? stride[0] - 1 : 0,
                more_cols = ceil_mode ? stride[1] - 1 : 0;
  FR_CHECK_VALUE(rows + more_rows >= kernel[0] && cols + more_cols >= kernel[1], op,
                 ": pool_kernel: expected at most the padded map of ", h, " x ", w, ", got ",
                 kernel);
  check_numel(op, "pool_padding", {c, rows, cols, n});
}

// Checks the arguments of bn_add_relu, on any device.
inline void check_bn(const char* op, const Tensor& x, const OptionalTensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& residual,
                     bool training) {
  check_map(op, "x", x);
  const int64_t channels = x.size(1);
  check_vector(op, "weight", weight, channels, x);
  check_vector(op, "bias", bias, channels, x);
  check_vector(op, "running_mean", running_mean, channels, x);
  check_vector(op, "running_var", running_var, channels, x);
  check_same(op, "residual", residual, x.sizes(), x);
  FR_CHECK_VALUE(training || (running_mean && running_var), op,
                 ": running_mean, running_var: expected tensors when not training, got None");
}

// Checks the arguments of bn_add_relu_backward, on any device.
inline void check_bn_backward(const char* op, const Tensor& grad, const Tensor& x,
                              const OptionalTensor& y, const OptionalTensor& weight,
                              const Tensor& mean, const Tensor& var, Activation activation) {
  check_map(op, "x", x);
  const int64_t channels = x.size(1);
  check_same(op, "grad", grad, x.sizes(), x);
  check_same(op, "y", y, x.sizes(), x);
  check_vector(op, "weight", weight, channels, x);
  check_vector(op, "mean", mean, channels, x);
  check_vector(op, "var", var, channels, x);
  FR_CHECK_VALUE(y || activation == Activation::kNone, op,
                 ": y: expected a tensor with an activation, got None");
}

}  // namespace fr
