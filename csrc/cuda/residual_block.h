// Launcher of the kernel that keeps a bottleneck's 3x3 on chip.
#pragma once

#include "conv_bn_add_relu.h"

namespace fr {

// What residual_block.cuh computes: `first` is the 3x3, with its affine step and nothing else
// behind it, `second` what follows the 1x1 by weight2, [second.k][first.epilogue.k].
struct ResidualBlockCall {
  ConvParams first;
  const void* weight2;
  ConvEpilogue second;
};

// Whether there is a kernel for it: float16 or bfloat16, 64 or 128 middle channels, whole packs.
bool residual_block_fits(const ResidualBlockCall& call, ConvPrecision precision, bool aligned);

cudaError_t residual_block(const ResidualBlockCall& call, ConvPrecision precision,
                           cudaStream_t stream);

}  // namespace fr
