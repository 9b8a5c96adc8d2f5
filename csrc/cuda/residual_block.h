// Launcher of the kernel that keeps the result of a bottleneck's 3x3 on chip.
#pragma once

#include "conv_bn_add_relu.h"

namespace fr {

// The operands of residual_block.cuh: `first` is the 3x3 with its affine step only, `second` the
// epilogue of the 1x1 whose weight is weight2, [second.k][first.epilogue.k].
struct ResidualBlockCall {
  ConvParams first;
  const void* weight2;
  ConvEpilogue second;
};

// Whether a kernel supports it: float16 or bfloat16, 64 or 128 middle channels, whole packs.
bool residual_block_fits(const ResidualBlockCall& call, ConvPrecision precision, bool aligned);

cudaError_t residual_block(const ResidualBlockCall& call, ConvPrecision precision,
                           cudaStream_t stream);

}  // namespace fr
