// Operators on a convolution that other host functions call.
#pragma once

#include "conv_call.h"

namespace fr {

Tensor conv_bn_add_relu_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& conv_bias,
                             const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                             const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
                             IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                             int64_t groups, double eps, Activation activation);

Tensor conv_bn_add_relu_packed_cuda(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                    const Tensor& shift, const OptionalTensor& residual,
                                    IntArrayRef weight_shape, IntArrayRef stride,
                                    IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                    Activation activation, bool winograd);

}  // namespace fr
