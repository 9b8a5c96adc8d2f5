// Launchers of the end of a block in training, and of batch norm's numbers: raw pointers and plain
// numbers, no torch header.
#pragma once

#include "bn_add_relu.h"

namespace fr {

// Maps have the type `storage` and are traversed as planned with `by_packs`.
cudaError_t block_end(const BlockEndParams& params, Storage storage, bool by_packs,
                      cudaStream_t stream);

// A thread for each channel, of which there is at least one.
cudaError_t bn_coefficients(const BnCoefficientsParams& params, cudaStream_t stream);
cudaError_t bn_update_running(const BnUpdateRunningParams& params, cudaStream_t stream);
cudaError_t bn_backward_coefficients(const BnBackwardCoefficientsParams& params,
                                     cudaStream_t stream);

}  // namespace fr
