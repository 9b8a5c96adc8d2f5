// Batch norm, residual and ReLU of channels-last maps by the passes of a training step: float32
// arithmetic and sums, which a core computes as fast as memory delivers the maps. bn_add_relu.cpp
// has the other layouts and dtypes.
#pragma once

#include "../activation.h"
#include "../tensor.h"
#include "folding.h"

namespace fr {

bool has_bn_passes(const Tensor& x, MemoryFormat format);

// What bn_add_relu returns. `residual` may be undefined; the operands are checked and
// channels-last.
std::tuple<Tensor, Tensor, Tensor> bn_forward_passes(const Tensor& x, const OptionalTensor& weight,
                                                     const OptionalTensor& bias,
                                                     const OptionalTensor& running_mean,
                                                     const OptionalTensor& running_var,
                                                     const Tensor& residual, bool training,
                                                     double eps, Activation activation);

// What bn_add_relu_backward returns. `y` is undefined without an activation.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_backward_passes(
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& var, bool training, double eps, Activation activation,
    bool need_residual);

}  // namespace fr
