// The passes of a training step over maps, also for the primitives that have a convolution.
#pragma once

#include "../../activation.h"
#include "../../tensor.h"

namespace fr {

// p(x) = activation(x * scale + shift), channels-last. The vectors are float32.
Tensor normalized(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                  Activation activation);

// x + y, channels-last.
Tensor added(const char* op, const Tensor& x, const Tensor& y);

// g, the gradient `dy` through the activation whose result is y; without y it is undefined, and dy
// counts. Its sums alone and times z - mean, float32, where they are wanted. `in_place`: g is
// written to dy, which is channels-last.
struct MaskedGradient {
  Tensor g, sum_g, sum_g_xc;
};
MaskedGradient masked_gradient(const char* op, const Tensor& dy, const OptionalTensor& y,
                               const Tensor& z, const Tensor& mean, bool sums,
                               Activation activation, bool in_place);

}  // namespace fr
