// The gradients of z = conv(p(x), weight) from that of the batch norm that follows it.
//
// The data gradient of a convolution of stride 1 is ours: the forward's kernel on dz, whose windows
// go backwards through it, with the filters transposed (PyTorch copies them) and the shortcut's
// gradient as the residual of its epilogue. With a stride it is PyTorch's convolution, and the
// weight gradient always is: a product over all pixels of a batch, for which we have no kernel in
// CUDA C++. dz = a * g + b * z + c, p(x), and the mask with its sums are passes of our own.
#include <tuple>

#include "block_end.h"
#include "bn_call.h"
#include "conv_call.h"
#include "training_operands.h"

namespace fr {
namespace {

// dz = a * g + b * z + c, or a * g.
Tensor gradient_map(const char* op, const Tensor& g, const OptionalTensor& z, const Tensor& a,
                    const OptionalTensor& b, const OptionalTensor& c) {
  BnCall call(op, g, kChannelsLast);
  Tensor dz;
  BnBackwardParams p{};
  p.grad = call.input(g);
  p.x = z ? call.input(*z) : nullptr;
  p.dx = call.result(dz);
  p.activation = Activation::kNone;
  if (g.numel() == 0) return dz;
  p.a = call.vector(a);
  p.b = call.vector(b);
  p.c = call.vector(c);
  p.map = call.plan();
  call.launch(bn_backward, p);
  return dz;
}

// The filters of a data gradient, (C, K / groups, kh, kw) with the channels last, flat.
Tensor transposed(const Tensor& weight, const ConvShape& s) {
  const Tensor apart = view(weight, {s.groups, s.group_k(), s.group_c(), s.kh, s.kw});
  return view(permute(apart, {0, 2, 3, 4, 1}).clone(kContiguous), {-1});
}

// The sum over the taps (ky, kx) of dz at pixel (y + pad - ky * dilation, ...) of the result: a
// convolution whose window begins inside of the map and goes backwards. Stride 1.
Tensor data_gradient(const char* op, const Tensor& dz, const Tensor& weight, const ConvShape& s,
                     const OptionalTensor& add) {
  ConvShape back = s;
  back.h = s.out_h();
  back.w = s.out_w();
  back.c = s.k;
  back.k = s.c;
  back.pad_h = -s.pad_h;
  back.pad_w = -s.pad_w;
  back.dilation_h = -s.dilation_h;
  back.dilation_w = -s.dilation_w;
  ConvCall call(op, dz, back);
  call.set_packed(transposed(weight, s));
  call.set_residual(add, {}, {});
  return call.run();
}

// PyTorch's, the weight's in the weight's own strides.
ConvolutionGradients by_pytorch(const Tensor& dz, const Tensor& p, const Tensor& weight,
                                const ConvShape& s, bool need_input, bool need_weight) {
  auto [g_x, dw] =
      convolution_backward(dz, p, weight, {s.stride_h, s.stride_w}, {s.pad_h, s.pad_w},
                           {s.dilation_h, s.dilation_w}, s.groups, need_input, need_weight);
  if (need_input) g_x = g_x.contiguous(kChannelsLast);
  if (need_weight) {
    const Tensor strided = empty_like(weight);
    if (!dw.strides().equals(strided.strides())) dw = strided.copy_(dw);
  }
  return {g_x, dw};
}

// The last argument but one, whether Winograd's algorithm may run, is for the CPU.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward_cuda(
    const Tensor& g, const OptionalTensor& z, const Tensor& a, const OptionalTensor& b,
    const OptionalTensor& c, const Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, const OptionalTensor& x_mean, const Tensor& weight,
    const OptionalTensor& add, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups, bool need_input, bool need_weight, bool sums, bool, Activation activation) {
  const char* op = "conv_backward";
  const ConvShape s = conv_shape(op, x, weight.sizes(), stride, padding, dilation, groups);
  check_conv_sizes(op, s);
  const std::array<int64_t, 4> result{s.n, s.k, s.out_h(), s.out_w()};
  check_same(op, "weight", weight, weight.sizes(), x);
  check_same(op, "g", g, result, x);
  check_same(op, "z", z, result, x);
  check_same(op, "add", add, x.sizes(), x);
  check_both(op, "z", z, "b", b);
  check_both(op, "z", z, "c", c);
  check_both(op, "x_scale", x_scale, "x_shift", x_shift);
  check_floats(op, "a", a, s.k, x);
  check_floats(op, "b", b, s.k, x);
  check_floats(op, "c", c, s.k, x);
  check_floats(op, "x_scale", x_scale, s.c, x);
  check_floats(op, "x_shift", x_shift, s.c, x);
  check_floats(op, "x_mean", x_mean, s.c, x);
  FR_CHECK_VALUE(!sums || (x_scale && x_mean), op,
                 ": x_scale, x_mean: expected tensors with sums=True, got None");
  FR_CHECK_VALUE(!add || !x_scale, op, ": add: expected None with x_scale, got a tensor");
  sums = sums && need_input;

  Tensor g_x = empty({0}, x.options()), dw = empty({0}, weight.options());
  if (!need_input && !need_weight) return {g_x, dw, nothing(x), nothing(x)};
  const Tensor dz = gradient_map(op, g, z, a, b, c);
  const bool masked = x_scale && activation != Activation::kNone;
  Tensor p = x;
  if (x_scale && (need_weight || masked)) p = normalized(op, x, *x_scale, *x_shift, activation);

  const bool own = s.stride_h == 1 && s.stride_w == 1;
  if (need_weight || (need_input && !own)) {
    const auto found = by_pytorch(dz, p, weight, s, need_input && !own, need_weight);
    if (need_weight) dw = found.weight;
    if (need_input && !own) g_x = add ? added(op, found.input, *add) : found.input;
  }
  if (need_input && own) g_x = data_gradient(op, dz, weight, s, add);
  if (!need_input || !x_scale) return {g_x, dw, nothing(x), nothing(x)};
  // The sign of p(x), which PyTorch's ReLU would go by too.
  const OptionalTensor mask = masked ? OptionalTensor(p) : OptionalTensor();
  const Tensor& mean = x_mean ? *x_mean : *x_scale;  // without sums it isn't used
  const MaskedGradient found = masked_gradient(op, g_x, mask, x, mean, sums, activation, true);
  return {g_x, dw, found.sum_g, found.sum_g_xc};
}

}  // namespace

FR_CUDA_LIBRARY(m) { m.impl("conv_backward", FR_BOX(conv_backward_cuda)); }

}  // namespace fr
