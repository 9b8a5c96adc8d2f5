// Batch norm folded into per-channel numbers, in float64 arithmetic.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <optional>
#include <vector>

namespace fr {

using OptionalTensor = std::optional<at::Tensor>;

// Type of sums and of a convolution's per-channel scale and shift.
inline at::ScalarType accumulator(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

// Type of the per-channel numbers in kernels/bn_add_relu.h.
inline at::ScalarType bn_arithmetic(at::ScalarType storage) {
  return storage == at::kDouble || storage == at::kFloat ? at::kDouble : at::kFloat;
}

// A vector as float64, or filled with `otherwise` if it is absent. Plain loops, because a dozen
// tensor operators on such short vectors would cost more than a small convolution.
inline std::vector<double> numbers(const OptionalTensor& v, int64_t size, double otherwise) {
  std::vector<double> result(static_cast<size_t>(size), otherwise);
  if (!v) return result;
  const at::Tensor source = v->contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "numbers", [&] {
    const scalar_t* p = source.const_data_ptr<scalar_t>();
    for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<double>(p[i]);
  });
  return result;
}

inline at::Tensor as_tensor(const std::vector<double>& values, at::ScalarType type) {
  const at::Tensor t = at::empty({static_cast<int64_t>(values.size())}, type);
  AT_DISPATCH_FLOATING_TYPES(type, "as_tensor", [&] {
    scalar_t* p = t.mutable_data_ptr<scalar_t>();
    for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<scalar_t>(values[i]);
  });
  return t;
}

// weight / sqrt(var + eps).
inline std::vector<double> bn_scale(const OptionalTensor& weight, const at::Tensor& var,
                                    double eps) {
  std::vector<double> scale = numbers(weight, var.size(0), 1);
  const std::vector<double> v = numbers(var, var.size(0), 1);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] /= std::sqrt(v[i] + eps);
  return scale;
}

struct Folded {
  at::Tensor scale, shift;
};

// scale * conv + shift = weight * (conv + conv_bias - mean) / sqrt(var + eps) + bias.
inline Folded fold(const OptionalTensor& conv_bias, const OptionalTensor& weight,
                   const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& var,
                   double eps, at::ScalarType type) {
  const int64_t size = mean.size(0);
  const std::vector<double> scale = bn_scale(weight, var, eps);
  const std::vector<double> before = numbers(conv_bias, size, 0), center = numbers(mean, size, 0);
  std::vector<double> shift = numbers(bias, size, 0);
  for (size_t i = 0; i < shift.size(); ++i) shift[i] += (before[i] - center[i]) * scale[i];
  return {as_tensor(scale, type), as_tensor(shift, type)};
}

}  // namespace fr
