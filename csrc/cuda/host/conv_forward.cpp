// z = conv(p(x), weight) and the batch statistics of z.
//
// The statistics are taken in the convolution's epilogue. The prologue p is a pass of its own,
// which writes a normalised map that the convolution reads: operands go from global to shared
// memory by asynchronous copies, which cannot change them on the way. Nobody keeps that map.
#include <tuple>

#include "block_end.h"
#include "conv_call.h"
#include "training_operands.h"

namespace fr {
namespace {

// The last argument but one, whether Winograd's algorithm may run, is for the CPU.
std::tuple<Tensor, Tensor, Tensor> conv_forward_cuda(const Tensor& x, const OptionalTensor& x_scale,
                                                     const OptionalTensor& x_shift,
                                                     const Tensor& weight, IntArrayRef stride,
                                                     IntArrayRef padding, IntArrayRef dilation,
                                                     int64_t groups, bool statistics, bool,
                                                     Activation activation) {
  const char* op = "conv_forward";
  check_map(op, "x", x);
  check_both(op, "x_scale", x_scale, "x_shift", x_shift);
  check_floats(op, "x_scale", x_scale, x.size(1), x);
  check_floats(op, "x_shift", x_shift, x.size(1), x);
  const Tensor p = x_scale ? normalized(op, x, *x_scale, *x_shift, activation) : x;
  ConvCall call(op, p, weight.sizes(), {stride, padding, dilation, groups});
  call.set_weight(weight);
  if (!statistics) return {call.run(), nothing(x), nothing(x)};
  const std::vector<Tensor> results = call.run_with_statistics();
  return {results[0], results[1], results[2]};
}

}  // namespace

FR_CUDA_LIBRARY(m) { m.impl("conv_forward", FR_BOX(conv_forward_cuda)); }

}  // namespace fr
