// The end of a residual block in training, and its backward.
//
// The backward is the reducing kernel of bn_add_relu's backward. A projection's sum is a second
// launch of it, which reads g again: a third pair of compensated sums for eight channels would not
// fit into the 80 registers of three blocks, and only the first block of a stage has one.
#include "block_end.h"

#include <tuple>

#include "../block_end.h"
#include "bn_call.h"
#include "training_operands.h"

namespace fr {
namespace {

Tensor run_block_end(const char* op, const Tensor& z, const OptionalTensor& scale,
                     const OptionalTensor& shift, const OptionalTensor& shortcut,
                     const OptionalTensor& shortcut_scale, const OptionalTensor& shortcut_shift,
                     Activation activation) {
  BnCall call(op, z, kChannelsLast);
  Tensor y;
  BlockEndParams p{};
  p.z = call.input(z);
  p.shortcut = shortcut ? call.input(*shortcut) : nullptr;
  p.y = call.result(y);
  p.activation = activation;
  if (z.numel() == 0) return y;
  p.scale = call.vector(scale);
  p.shift = call.vector(shift);
  p.shortcut_scale = call.vector(shortcut_scale);
  p.shortcut_shift = call.vector(shortcut_shift);
  p.map = call.plan();
  call.launch(fr::block_end, p);
  return y;
}

Tensor block_end_cuda(const Tensor& z, const Tensor& scale, const Tensor& shift,
                      const OptionalTensor& shortcut, const OptionalTensor& shortcut_scale,
                      const OptionalTensor& shortcut_shift, Activation activation) {
  const char* op = "block_end";
  check_map(op, "z", z);
  const int64_t channels = z.size(1);
  check_floats(op, "scale", scale, channels, z);
  check_floats(op, "shift", shift, channels, z);
  check_same(op, "shortcut", shortcut, z.sizes(), z);
  check_both(op, "shortcut_scale", shortcut_scale, "shortcut_shift", shortcut_shift);
  FR_CHECK_VALUE(shortcut || !shortcut_scale, op,
                 ": shortcut: expected a tensor with shortcut_scale, got None");
  check_floats(op, "shortcut_scale", shortcut_scale, channels, z);
  check_floats(op, "shortcut_shift", shortcut_shift, channels, z);
  return run_block_end(op, z, scale, shift, shortcut, shortcut_scale, shortcut_shift, activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_end_backward_cuda(
    const Tensor& dy, const OptionalTensor& y, const Tensor& z, const Tensor& mean,
    const OptionalTensor& shortcut, const OptionalTensor& shortcut_mean, bool sums,
    Activation activation) {
  const char* op = "block_end_backward";
  check_map(op, "z", z);
  const int64_t channels = z.size(1);
  check_same(op, "dy", dy, z.sizes(), z);
  check_same(op, "y", y, z.sizes(), z);
  check_floats(op, "mean", mean, channels, z);
  check_both(op, "shortcut", shortcut, "shortcut_mean", shortcut_mean);
  check_same(op, "shortcut", shortcut, z.sizes(), z);
  check_floats(op, "shortcut_mean", shortcut_mean, channels, z);
  const MaskedGradient found = masked_gradient(op, dy, y, z, mean, sums, activation, false);
  Tensor side = nothing(z);
  if (sums && shortcut) {
    const Tensor& g = y ? found.g : dy;
    side = masked_gradient(op, g, {}, *shortcut, *shortcut_mean, true, Activation::kNone, false)
               .sum_g_xc;
  }
  return {y ? found.g : empty({0}, z.options()), found.sum_g, found.sum_g_xc, side};
}

}  // namespace

Tensor normalized(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                  Activation activation) {
  return run_block_end(op, x, scale, shift, {}, {}, {}, activation);
}

Tensor added(const char* op, const Tensor& x, const Tensor& y) {
  return run_block_end(op, x, {}, {}, y, {}, {}, Activation::kNone);
}

MaskedGradient masked_gradient(const char* op, const Tensor& dy, const OptionalTensor& y,
                               const Tensor& z, const Tensor& mean, bool sums,
                               Activation activation, bool in_place) {
  MaskedGradient found{{}, nothing(z), nothing(z)};
  BnCall call(op, z, kChannelsLast);
  BnBackwardReduceParams r{};
  r.grad = call.input(dy);
  r.x = call.input(z);
  r.y = y ? call.input(*y) : nullptr;
  r.activation = activation;
  r.mean = call.vector(mean);
  if (y && in_place) {
    found.g = dy;
    r.dz = dy.mutable_data_ptr();
  } else if (y) {
    r.dz = call.result(found.g);
  }
  const int64_t channels = z.size(1);
  if (sums) {
    found.sum_g = call.floats(channels);
    found.sum_g_xc = call.floats(channels);
  }
  if (z.numel() == 0) {
    found.sum_g.zero_();
    found.sum_g_xc.zero_();
    return found;
  }
  if (!y && !sums) return found;

  r.map = call.plan();
  r.partials = call.scratch(bn_backward_partial_numel(r.map));
  call.launch(bn_backward_reduce, r);
  if (!sums) return found;
  BnBackwardFinishParams f{};
  f.partials = r.partials;
  f.dweight = found.sum_g_xc.mutable_data_ptr<float>();
  f.dbias = found.sum_g.mutable_data_ptr<float>();
  f.channels = r.map.channels;
  f.slabs = r.map.slabs;
  f.values = static_cast<double>(z.numel()) / static_cast<double>(channels);
  call.launch(bn_backward_finish, f);
  return found;
}

FR_CUDA_LIBRARY(m) {
  m.impl("block_end", FR_BOX(block_end_cuda));
  m.impl("block_end_backward", FR_BOX(block_end_backward_cuda));
}

}  // namespace fr
