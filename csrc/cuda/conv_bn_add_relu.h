// Launchers of the convolution's kernels: raw pointers and plain numbers, no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include "../conv_shape.h"
#include "kernels/conv_params.cuh"

namespace fr {

// The multiplication, which implies the storage type: float16, bfloat16, or float32 rounded to tf32
// on tensor cores; or float32 on the ordinary cores.
enum class ConvPrecision { kFloat16, kBFloat16, kTf32, kFloat32 };

// An index into the kernel's table of tiles, and the number of parts that the sum is split into.
struct ConvPlan {
  int tile;
  int split_k;
};

constexpr int kConvTiles = 3;

// Fills in the sizes; the caller adds operands, epilogue and the second convolution.
ConvParams conv_params(const ConvShape& shape);

// Whether x and the filters can be loaded 16 bytes at a time; `aligned` says that all maps and
// filters begin at multiples of 16 bytes.
bool conv_by_packs(const ConvParams& params, ConvPrecision precision, bool aligned);

// The first tile that can be used, as can all after it: the last one unless both x and y come in
// packs of 16 bytes, and no residual has an affine step.
int first_conv_tile(const ConvParams& params, ConvPrecision precision, bool aligned);

// The tile and split with the lowest cost by a model; `multiprocessors` of the device.
ConvPlan plan_conv(const ConvParams& params, ConvPrecision precision, bool aligned, bool may_split,
                   int multiprocessors);

// Floats of workspace that a plan needs for partial sums: zero without a split.
int64_t conv_partial_numel(const ConvParams& params, const ConvPlan& plan);

// Floats that a plan needs for statistics: those that the convolution writes, and those into which
// conv_statistics merges them.
int64_t conv_statistics_numel(const ConvParams& params, const ConvPlan& plan);

// Launches the convolution.
cudaError_t conv_bn_add_relu(ConvParams params, ConvPrecision precision, const ConvPlan& plan,
                             bool aligned, cudaStream_t stream);

// Computes mean and biased variance from what the convolution has written to params.statistics.
cudaError_t conv_statistics(const ConvParams& params, const ConvPlan& plan, float* mean, float* var,
                            cudaStream_t stream);

}  // namespace fr
