// Launcher of the stem's kernel: raw pointers and plain numbers, no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include "conv_bn_add_relu.h"
#include "kernels/stem_params.cuh"

namespace fr {

// Size of the pooled map along one dimension.
inline int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// Fills in all parameters but the operands. Returns false if no tile fits: for groups, too large a
// pooling window or filter, or strict float32.
bool plan_stem(const ConvShape& shape, const PoolWindow& pool, ConvPrecision precision,
               StemParams* params);

cudaError_t conv_bn_relu_maxpool(const StemParams& params, ConvPrecision precision,
                                 int multiprocessors, cudaStream_t stream);

}  // namespace fr
