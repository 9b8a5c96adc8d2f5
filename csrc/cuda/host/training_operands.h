// Checks of the operands of the training primitives, whose maps are channels-last and whose vectors
// per channel are float32.
#pragma once

#include "../../checks.h"
#include "../../tensor.h"

namespace fr {

// A vector with a float32 number for each channel, on the device of `like`.
inline void check_floats(const char* op, const char* name, const Tensor& v, int64_t channels,
                         const Tensor& like) {
  check_vector(op, name, v, channels, like);
  FR_CHECK_TYPE(v.scalar_type() == ScalarType::Float, op, ": ", name,
                ": expected dtype float32, got ", v.scalar_type());
}
inline void check_floats(const char* op, const char* name, const OptionalTensor& v,
                         int64_t channels, const Tensor& like) {
  if (v.has_value()) check_floats(op, name, *v, channels, like);
}

// Both of two operands or neither of them.
inline void check_both(const char* op, const char* first, const OptionalTensor& a,
                       const char* second, const OptionalTensor& b) {
  FR_CHECK_VALUE(a.has_value() == b.has_value(), op, ": ", first, ", ", second,
                 ": expected both or neither, got ", a ? first : second, " alone");
}

// A result that is not wanted. An operator must not return one tensor twice, not even an empty one.
inline Tensor nothing(const Tensor& like) {
  return empty({0}, like.options().dtype(ScalarType::Float));
}

}  // namespace fr
