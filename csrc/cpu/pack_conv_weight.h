// A convolution's weight in the order in which the microkernel reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../conv_shape.h"

namespace fr {

// Spatial sizes of the input do not matter here; `shape` needs k, kh, kw, c and groups.
int64_t packed_bytes(const at::Tensor& weight, const ConvShape& shape);
void pack_weight(const at::Tensor& weight, const ConvShape& shape, void* packed);

}  // namespace fr
