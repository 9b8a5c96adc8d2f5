// The operands of the training primitives, checked and as the kernels take them: channels-last maps
// whose memory is all there, and contiguous vectors of the arithmetic type.
#pragma once

#include <optional>

#include "../../checks.h"
#include "../../tensor.h"
#include "../folding.h"

namespace fr {

// A checked map in channels-last memory; for `name` see checks.h.
Tensor map_operand(const char* op, const char* name, const Tensor& t);

// The same, of a shape that is given and of the dtype and device of `like`.
Tensor map_operand(const char* op, const char* name, const Tensor& t, IntArrayRef shape,
                   const Tensor& like);

// A vector with an element for each channel: float64 for float64 maps, else float32.
Tensor vector_operand(const char* op, const char* name, const Tensor& t, int64_t channels,
                      const Tensor& map);

// Both of two vectors or neither of them.
void check_together(const char* op, const char* first, const OptionalTensor& a, const char* second,
                    const OptionalTensor& b);

// A convolution of x by `weight`, all of its sizes checked; x may be null but for its shape.
ConvShape training_shape(const char* op, const Tensor& x, const Tensor& weight, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups);

inline const void* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

}  // namespace fr
