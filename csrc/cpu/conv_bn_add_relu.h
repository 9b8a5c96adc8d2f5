// Shared by the operators that begin with a convolution: checked operands, ready for the driver.
#pragma once

#include <memory>

#include "../tensor.h"
#include "conv_driver.h"
#include "folding.h"
#include "scratch.h"

namespace fr {

// Owns the memory that `args` points to. The caller sets `args.y`.
struct ConvCall {
  Tensor x, packed, scale, shift, residual;
  // A weight that was packed, and a batch norm that was folded, for this call only.
  std::unique_ptr<Scratch> live;
  std::unique_ptr<char[]> folded;
  ConvForward args{};
  DType dtype = kFloat32;
};

struct ConvGeometry {
  IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// A call with live parameters: packs the weight and folds batch norm.
ConvCall prepare(const char* op, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& conv_bias, const OptionalTensor& bn_weight,
                 const OptionalTensor& bn_bias, const Tensor& mean, const Tensor& var,
                 const OptionalTensor& residual, const ConvGeometry& geometry, double eps,
                 Activation activation);

// conv(x, weight) alone, by the direct sum, as a channels-last map.
Tensor direct_convolution(const char* op, const Tensor& x, const Tensor& weight,
                          const ConvGeometry& geometry);

// Throws unless packed, scale and shift have the sizes and dtypes of such a convolution of x.
void check_packed(const char* op, const ConvShape& shape, const Tensor& x, const Tensor& packed,
                  const Tensor& scale, const Tensor& shift);

// A call with parameters that freeze has packed and folded.
ConvCall prepare_packed(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const Tensor& shift, const OptionalTensor& residual,
                        IntArrayRef weight_shape, const ConvGeometry& geometry,
                        Activation activation);

Tensor conv_bn_add_relu_packed_cpu(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                   const Tensor& shift, const OptionalTensor& residual,
                                   IntArrayRef weight_shape, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                   Activation activation, bool winograd);

}  // namespace fr
