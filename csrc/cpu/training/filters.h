// A convolution's weight as the kernels read it, and its gradient as the parameter has it.
#pragma once

#include "../../tensor.h"

namespace fr {

// The weight as [k][kh][kw][c / groups] of the maps' type, which is channels-last; a float32 weight
// beside maps of 16 bits is rounded. The weight itself where nothing is to be done.
Tensor filters_of(const Tensor& weight, ScalarType maps);

// The same in the order that it has, for PyTorch's convolutions and inference's.
inline Tensor as_type(const Tensor& weight, ScalarType maps) {
  return weight.scalar_type() == maps ? weight : filters_of(weight, maps);
}

// Writes a gradient, channels-last and of the maps' type or their accumulator's, to one that may
// have other strides and the other of these types.
void put_gradient(const Tensor& filters, const Tensor& gradient, ScalarType maps);

}  // namespace fr
