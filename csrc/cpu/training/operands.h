// The operands of the training primitives, checked and as the kernels take them: channels-last maps
// whose memory is all there, and contiguous vectors of the arithmetic type.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "../../checks.h"
#include "../folding.h"

namespace fr {

// A checked map in channels-last memory; for `name` see checks.h.
at::Tensor map_operand(const char* op, const char* name, const at::Tensor& t);

// The same, of a shape that is given and of the dtype and device of `like`.
at::Tensor map_operand(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape,
                       const at::Tensor& like);

// A vector with an element for each channel: float64 for float64 maps, else float32.
at::Tensor vector_operand(const char* op, const char* name, const at::Tensor& t, int64_t channels,
                          const at::Tensor& map);

// Both of two vectors or neither of them.
void check_together(const char* op, const char* first, const OptionalTensor& a, const char* second,
                    const OptionalTensor& b);

// A convolution of x by `weight`, all of its sizes checked; x may be null but for its shape.
ConvShape training_shape(const char* op, const at::Tensor& x, const at::Tensor& weight,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups);

inline const void* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

}  // namespace fr
