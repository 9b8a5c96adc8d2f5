// Launchers of batch norm's kernels: raw pointers and plain numbers, no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/bn_params.cuh"

namespace fr {

// The types in which maps are stored.
enum class Storage { kFloat32, kFloat16, kBFloat16 };

constexpr int storage_bytes(Storage s) { return s == Storage::kFloat32 ? 4 : 2; }

// Plans the traversal of a map of `images` x `channels` x `plane`. `by_packs` says that it can be
// accessed 16 bytes at a time: all maps begin at multiples of 16 bytes, and the channels
// (channels-last) or the plane are a whole number of packs. Requires images * plane < 2^30.
BnMap plan_bn(int64_t images, int64_t channels, int64_t plane, bool channels_last, Storage storage,
              bool by_packs, int multiprocessors);

// Floats of partial results that the reducing kernels write, in forward and in backward.
int64_t bn_partial_numel(const BnMap& map);
int64_t bn_backward_partial_numel(const BnMap& map);

// Maps have the type `storage` and are traversed as planned with `by_packs`.
cudaError_t bn_statistics(const BnStatisticsParams& params, Storage storage, bool by_packs,
                          cudaStream_t stream);
cudaError_t bn_statistics_finish(const BnStatisticsFinishParams& params, cudaStream_t stream);
cudaError_t bn_add_relu(const BnForwardParams& params, Storage storage, bool by_packs,
                        cudaStream_t stream);
cudaError_t bn_backward_reduce(const BnBackwardReduceParams& params, Storage storage, bool by_packs,
                               cudaStream_t stream);
cudaError_t bn_backward_finish(const BnBackwardFinishParams& params, cudaStream_t stream);
cudaError_t bn_backward(const BnBackwardParams& params, Storage storage, bool by_packs,
                        cudaStream_t stream);

}  // namespace fr
