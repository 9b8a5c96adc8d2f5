// Launchers of the convolution's kernels: raw pointers and plain numbers, no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include "../conv_shape.h"
#include "kernels/conv_params.cuh"

namespace fr {

// What multiplies, and with it the storage type: float16, bfloat16, or float32 rounded to tf32 on
// tensor cores; or float32 on the ordinary cores.
enum class ConvPrecision { kFloat16, kBFloat16, kTf32, kFloat32 };

// An index of the kernel's table of tiles, and into how many parts the depth of a sum is cut.
struct ConvPlan {
  int tile;
  int split_k;
};

constexpr int kConvTiles = 3;

// Fills in sizes; operands, epilogue and the second convolution are the caller's to add.
ConvParams conv_params(const ConvShape& shape);

// Whether 16 bytes at a time will do for x and the filters; `aligned` says that all maps and
// filters begin at multiples of that. If not, there is only the last tile.
bool conv_by_packs(const ConvParams& params, ConvPrecision precision, bool aligned);

// The tile and split that a model of cost finds cheapest; `multiprocessors` of the device.
ConvPlan plan_conv(const ConvParams& params, ConvPrecision precision, bool aligned, bool may_split,
                   int multiprocessors);

// Floats that a plan wants for the parts of its sums: zero without a split.
int64_t conv_partial_numel(const ConvParams& params, const ConvPlan& plan);

// Slabs of statistics that a plan makes.
int conv_slabs(const ConvParams& params, const ConvPlan& plan);

// Runs it.
cudaError_t conv_bn_add_relu(ConvParams params, ConvPrecision precision, const ConvPlan& plan,
                             bool aligned, cudaStream_t stream);

// Mean and biased variance from the slabs that a plan made.
cudaError_t conv_statistics(const ConvParams& params, const ConvPlan& plan, float* mean, float* var,
                            cudaStream_t stream);

}  // namespace fr
