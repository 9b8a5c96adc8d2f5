// Batch norm folded into per-channel numbers, in float64 arithmetic.
#pragma once

#include <cmath>
#include <memory>
#include <optional>
#include <utility>
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
  const int64_t step = v->stride(0);
  with_element(v->scalar_type(), [&](auto element) {
    const auto* p = v->const_data_ptr<decltype(element)>();
    for (int64_t i = 0; i < size; ++i)
      result[static_cast<size_t>(i)] = static_cast<double>(p[i * step]);
  });
  return result;
}

// Stores them as elements of this dtype.
inline void store(const std::vector<double>& values, ScalarType type, void* memory) {
  with_element(type, [&](auto element) {
    auto* p = static_cast<decltype(element)*>(memory);
    for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<decltype(element)>(values[i]);
  });
}

inline Tensor as_tensor(const std::vector<double>& values, ScalarType type) {
  const Tensor t = empty({static_cast<int64_t>(values.size())}, type);
  store(values, type, t.mutable_data_ptr());
  return t;
}

// weight / sqrt(var + eps).
inline std::vector<double> bn_scale(const OptionalTensor& weight, const Tensor& var, double eps) {
  std::vector<double> scale = numbers(weight, var.size(0), 1);
  const std::vector<double> v = numbers(var, var.size(0), 1);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] /= std::sqrt(v[i] + eps);
  return scale;
}

struct FoldedBatchNorm {
  std::vector<double> scale, shift;

  // Both as elements of this dtype, the shift after the scale. No tensors: allocating two of them
  // would take a tenth of an operator's call on a small map.
  std::unique_ptr<char[]> stored(ScalarType type) const {
    const size_t bytes = scale.size() * static_cast<size_t>(element_size(type));
    std::unique_ptr<char[]> memory(new char[2 * bytes]);
    store(scale, type, memory.get());
    store(shift, type, memory.get() + bytes);
    return memory;
  }
};

// scale * conv + shift = weight * (conv + conv_bias - mean) / sqrt(var + eps) + bias.
inline FoldedBatchNorm fold(const OptionalTensor& conv_bias, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            double eps) {
  const int64_t size = mean.size(0);
  std::vector<double> scale = bn_scale(weight, var, eps);
  const std::vector<double> before = numbers(conv_bias, size, 0), center = numbers(mean, size, 0);
  std::vector<double> shift = numbers(bias, size, 0);
  for (size_t i = 0; i < shift.size(); ++i) shift[i] += (before[i] - center[i]) * scale[i];
  return {std::move(scale), std::move(shift)};
}

}  // namespace fr
