// Batch norm folded into per-channel numbers, in float64 arithmetic.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "../tensor.h"

namespace fr {

// Type of sums and of a convolution's per-channel scale and shift.
inline ScalarType accumulator(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Type of the per-channel numbers in kernels/bn_add_relu.h.
inline ScalarType bn_arithmetic(ScalarType storage) {
  return storage == ScalarType::Double || storage == ScalarType::Float ? ScalarType::Double
                                                                       : ScalarType::Float;
}

// Calls f with an element of this dtype, for its type.
template <class F>
void with_element(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(c10::Half{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      throw_runtime_error(message("fused_resnet: not implemented for dtype ", type));
  }
}

// A vector as float64, or filled with `otherwise` if it is absent. Plain loops, because a dozen
// tensor operators on such short vectors would cost more than a small convolution.
inline std::vector<double> numbers(const OptionalTensor& v, int64_t size, double otherwise) {
  std::vector<double> result(static_cast<size_t>(size), otherwise);
  if (!v) return result;
  const Tensor source = v->contiguous();
  with_element(source.scalar_type(), [&](auto element) {
    const auto* p = source.const_data_ptr<decltype(element)>();
    for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<double>(p[i]);
  });
  return result;
}

inline Tensor as_tensor(const std::vector<double>& values, ScalarType type) {
  const Tensor t = empty({static_cast<int64_t>(values.size())}, type);
  with_element(type, [&](auto element) {
    auto* p = t.mutable_data_ptr<decltype(element)>();
    for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<decltype(element)>(values[i]);
  });
  return t;
}

// weight / sqrt(var + eps).
inline std::vector<double> bn_scale(const OptionalTensor& weight, const Tensor& var, double eps) {
  std::vector<double> scale = numbers(weight, var.size(0), 1);
  const std::vector<double> v = numbers(var, var.size(0), 1);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] /= std::sqrt(v[i] + eps);
  return scale;
}

struct Folded {
  Tensor scale, shift;
};

// scale * conv + shift = weight * (conv + conv_bias - mean) / sqrt(var + eps) + bias.
inline Folded fold(const OptionalTensor& conv_bias, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps,
                   ScalarType type) {
  const int64_t size = mean.size(0);
  const std::vector<double> scale = bn_scale(weight, var, eps);
  const std::vector<double> before = numbers(conv_bias, size, 0), center = numbers(mean, size, 0);
  std::vector<double> shift = numbers(bias, size, 0);
  for (size_t i = 0; i < shift.size(); ++i) shift[i] += (before[i] - center[i]) * scale[i];
  return {as_tensor(scale, type), as_tensor(shift, type)};
}

}  // namespace fr
