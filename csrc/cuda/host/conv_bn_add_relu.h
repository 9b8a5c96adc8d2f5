// Operators on a convolution that other host functions call.
#pragma once

#include "conv_call.h"

namespace fr {

at::Tensor conv_bn_add_relu_cuda(const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& conv_bias, const OptionalTensor& bn_weight,
                                 const OptionalTensor& bn_bias, const at::Tensor& mean,
                                 const at::Tensor& var, const OptionalTensor& residual,
                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef dilation, int64_t groups, double eps, bool relu);

at::Tensor conv_bn_add_relu_packed_cuda(const at::Tensor& x, const at::Tensor& packed,
                                        const at::Tensor& scale, const at::Tensor& shift,
                                        const OptionalTensor& residual,
                                        at::IntArrayRef weight_shape, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                        int64_t groups, bool relu, bool winograd);

}  // namespace fr
