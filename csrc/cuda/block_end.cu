#include "block_end.h"
#include "bn_launch.cuh"
#include "kernels/block_end.cuh"
#include "kernels/bn_coefficients.cuh"

namespace fr {
namespace {

// The grid of a thread for each channel.
dim3 grid_of_channels(int channels) {
  return dim3(static_cast<unsigned>((channels + kBnThreads - 1) / kBnThreads));
}

}  // namespace

cudaError_t block_end(const BlockEndParams& p, Storage storage, bool by_packs,
                      cudaStream_t stream) {
  return with_instance(storage, by_packs, [&](auto element, auto vector) {
    return launch(block_end_kernel<decltype(element), vector()>, grid_of(p.map), dim3(kBnThreads),
                  0, stream, p);
  });
}

cudaError_t bn_coefficients(const BnCoefficientsParams& p, cudaStream_t stream) {
  return launch(bn_coefficients_kernel, grid_of_channels(p.channels), dim3(kBnThreads), 0, stream,
                p);
}

cudaError_t bn_update_running(const BnUpdateRunningParams& p, cudaStream_t stream) {
  return launch(bn_update_running_kernel, grid_of_channels(p.channels), dim3(kBnThreads), 0, stream,
                p);
}

cudaError_t bn_backward_coefficients(const BnBackwardCoefficientsParams& p, cudaStream_t stream) {
  return launch(bn_backward_coefficients_kernel, grid_of_channels(p.channels), dim3(kBnThreads), 0,
                stream, p);
}

}  // namespace fr
