#include "../bn_add_relu.h"

#include <tuple>

#include "bn_call.h"

namespace fr {
namespace {

std::tuple<Tensor, Tensor, Tensor> bn_add_relu_cuda(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias,
                                                    const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var,
                                                    const OptionalTensor& residual, bool training,
                                                    double eps, Activation activation) {
  const char* op = "bn_add_relu";
  check_bn(op, x, weight, bias, running_mean, running_var, residual, training);
  const int64_t channels = x.size(1);

  BnCall call(op, x);
  Tensor y;
  BnForwardParams p{};
  p.x = call.input(x);
  p.residual = residual ? call.input(*residual) : nullptr;
  p.y = call.result(y);
  p.activation = activation;
  Tensor mean = call.floats(training ? channels : 0), var = call.floats(training ? channels : 0);
  // An empty batch has no statistics; zeros are finite in the backward, whose sums are zero.
  if (x.numel() == 0) return {y, mean.zero_(), var.zero_()};

  p.map = call.plan();
  const Tensor folded = call.floats(training ? 2 * channels : 0);
  if (training) {
    const Tensor pivot = call.floats(channels);
    const Tensor partials = call.floats(bn_partial_numel(p.map));
    BnStatisticsParams s{};
    s.map = p.map;
    s.x = p.x;
    s.pivot = pivot.mutable_data_ptr<float>();
    s.partials = partials.mutable_data_ptr<float>();
    call.launch(bn_statistics, s);

    BnStatisticsFinishParams f{};
    f.pivot = s.pivot;
    f.partials = s.partials;
    f.weight = call.vector(weight);
    f.bias = call.vector(bias);
    f.mean = mean.mutable_data_ptr<float>();
    f.var = var.mutable_data_ptr<float>();
    f.scale = folded.mutable_data_ptr<float>();
    f.shift = f.scale + channels;
    f.channels = p.map.channels;
    f.slabs = p.map.slabs;
    f.values = static_cast<double>(x.numel()) / static_cast<double>(channels);
    f.slab_values = f.values / p.map.items * p.map.slab_items;
    f.eps = eps;
    call.launch(bn_statistics_finish, f);
    p.affine = {f.scale, f.shift, f.mean, nullptr, 0.0f};
  } else {
    p.affine = {call.vector(weight), call.vector(bias), call.vector(running_mean),
                call.vector(running_var), static_cast<float>(eps)};
  }
  call.launch(fr::bn_add_relu, p);
  return {y, mean, var};
}

Tensor bn_add_relu_apply_cuda(const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                              const OptionalTensor& residual, double eps, Activation activation) {
  return std::get<0>(
      bn_add_relu_cuda(x, weight, bias, mean, var, residual, false, eps, activation));
}

// Returns the gradients of x, weight, bias and, if need_residual, of the residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cuda(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& var, bool training, double eps, Activation activation,
    bool need_residual) {
  const char* op = "bn_add_relu_backward";
  check_bn_backward(op, grad, x, y, weight, mean, var, activation);
  const int64_t channels = x.size(1);

  BnCall call(op, x);
  Tensor dx, dresidual = device_empty({0}, x.options());
  BnBackwardReduceParams r{};
  r.grad = call.input(grad);
  r.x = call.input(x);
  r.y = activation == Activation::kNone ? nullptr : call.input(*y);
  r.activation = activation;
  r.mean = call.vector(mean);
  r.dz = need_residual ? call.result(dresidual) : nullptr;
  BnBackwardParams p{};
  p.dx = call.result(dx);
  const Tensor dweight = call.floats(channels), dbias = call.floats(channels);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_(), dresidual};

  r.map = p.map = call.plan();
  const Tensor partials = call.floats(bn_backward_partial_numel(p.map));
  r.partials = partials.mutable_data_ptr<float>();
  call.launch(bn_backward_reduce, r);

  const Tensor coefficients = call.floats(3 * channels);
  BnBackwardFinishParams f{};
  f.partials = r.partials;
  f.weight = call.vector(weight);
  f.var = call.vector(var);
  f.dweight = dweight.mutable_data_ptr<float>();
  f.dbias = dbias.mutable_data_ptr<float>();
  f.coefficients = coefficients.mutable_data_ptr<float>();
  f.channels = p.map.channels;
  f.slabs = p.map.slabs;
  f.values = static_cast<double>(x.numel()) / static_cast<double>(channels);
  f.eps = eps;
  call.launch(bn_backward_finish, f);

  p.grad = need_residual ? r.dz : r.grad;
  p.y = need_residual ? nullptr : r.y;
  p.activation = activation;
  p.x = training ? r.x : nullptr;
  p.mean = r.mean;
  p.a = f.coefficients;
  p.b = p.a + channels;
  p.c = p.b + channels;
  call.launch(bn_backward, p);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("bn_add_relu", FR_BOX(bn_add_relu_cuda));
  m.impl("bn_add_relu_apply", FR_BOX(bn_add_relu_apply_cuda));
  m.impl("bn_add_relu_backward", FR_BOX(bn_add_relu_backward_cuda));
}

}  // namespace fr
