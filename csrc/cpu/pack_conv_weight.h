// Packs a convolution's weight into the order in which the microkernel reads it.
#pragma once

#include "../conv_shape.h"
#include "../tensor.h"

namespace fr {

// Of `shape`, only k, kh, kw, c and groups are read.
int64_t packed_bytes(const Tensor& weight, const ConvShape& shape);
void pack_weight(const Tensor& weight, const ConvShape& shape, void* packed);

}  // namespace fr
