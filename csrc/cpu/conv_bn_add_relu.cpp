#include "conv_bn_add_relu.h"

#include "../box.h"
#include "../checks.h"
#include "../tensor.h"
#include "pack_conv_weight.h"
#include "result_cache.h"

namespace fr {
namespace {

void bind_maps(const char* op, ConvCall& call, const Tensor& x, const OptionalTensor& residual,
               Activation activation) {
  const ConvShape& s = call.args.shape;
  call.x = x.contiguous(kChannelsLast);
  if (residual) {
    check_same(op, "residual", residual, {s.n, s.k, s.out_h(), s.out_w()}, x);
    call.residual = residual->contiguous(kChannelsLast);
    call.args.residual = call.residual.const_data_ptr();
  }
  call.args.x = call.x.const_data_ptr();
  call.args.activation = activation;
}

Tensor run(ConvCall& call, bool winograd) {
  const ConvShape& s = call.args.shape;
  const Tensor y = empty_map({s.n, s.k, s.out_h(), s.out_w()}, call.x.options());
  call.args.y = y.mutable_data_ptr();
  const ConvAlgorithm algorithm = conv_algorithm(call.dtype, s, winograd);
  run_on_thread_team([&](ThreadTeam& team) { run_conv(team, call.dtype, call.args, algorithm); });
  return y;
}

Tensor conv_bn_add_relu_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& conv_bias,
                            const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                            const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                            int64_t groups, double eps, Activation activation) {
  ConvCall call = prepare("conv_bn_add_relu", x, weight, conv_bias, bn_weight, bn_bias, mean, var,
                          residual, {stride, padding, dilation, groups}, eps, activation);
  // Live parameters promise the accuracy of the direct sum; only freeze may allow Winograd.
  return run(call, false).contiguous(x.suggest_memory_format());
}

}  // namespace

Tensor conv_bn_add_relu_packed_cpu(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                   const Tensor& shift, const OptionalTensor& residual,
                                   IntArrayRef weight_shape, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                   Activation activation, bool winograd) {
  const char* op = "conv_bn_add_relu_packed";
  ConvCall call = prepare_packed(op, x, packed, scale, shift, residual, weight_shape,
                                 {stride, padding, dilation, groups}, activation);
  return run(call, winograd);
}

ConvCall prepare(const char* op, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& conv_bias, const OptionalTensor& bn_weight,
                 const OptionalTensor& bn_bias, const Tensor& mean, const Tensor& var,
                 const OptionalTensor& residual, const ConvGeometry& g, double eps,
                 Activation activation) {
  ConvCall call;
  call.args.shape = conv_shape(op, x, weight.sizes(), g.stride, g.padding, g.dilation, g.groups);
  check_same(op, "weight", weight, weight.sizes(), x);
  check_vector(op, "conv_bias", conv_bias, weight.size(0), x);
  check_vector(op, "bn_weight", bn_weight, weight.size(0), x);
  check_vector(op, "bn_bias", bn_bias, weight.size(0), x);
  check_vector(op, "mean", mean, weight.size(0), x);
  check_vector(op, "var", var, weight.size(0), x);
  call.live = std::make_unique<Scratch>();
  char* const packed = call.live->at_least(packed_bytes(weight, call.args.shape));
  pack_weight(weight, call.args.shape, packed);
  call.args.packed = packed;
  const ScalarType type = accumulator(x.scalar_type());
  call.folded = fold(conv_bias, bn_weight, bn_bias, mean, var, eps).stored(type);
  call.args.scale = call.folded.get();
  call.args.shift = call.folded.get() + weight.size(0) * element_size(type);
  call.dtype = dtype_of(x.scalar_type());
  bind_maps(op, call, x, residual, activation);
  return call;
}

Tensor direct_convolution(const char* op, const Tensor& x, const Tensor& weight,
                          const ConvGeometry& geometry) {
  // A batch norm that changes nothing.
  const auto type = accumulator(x.scalar_type());
  const auto channels = static_cast<size_t>(weight.size(0));
  const Tensor zeros = as_tensor(std::vector<double>(channels, 0.0), type);
  const Tensor ones = as_tensor(std::vector<double>(channels, 1.0), type);
  ConvCall call = prepare(op, x, weight, std::nullopt, std::nullopt, std::nullopt, zeros, ones,
                          std::nullopt, geometry, 0, Activation::kNone);
  return run(call, false);
}

void check_packed(const char* op, const ConvShape& s, const Tensor& x, const Tensor& packed,
                  const Tensor& scale, const Tensor& shift) {
  const int64_t numel = kernels().of[dtype_of(x.scalar_type())].packed_numel(s);
  const auto check = [&](const char* name, const Tensor& t, int64_t size, ScalarType type) {
    check_vector(op, name, t, size, x);
    FR_CHECK_TYPE(t.scalar_type() == type, op, ": ", name, ": expected dtype ", type, ", got ",
                  t.scalar_type());
  };
  check("packed", packed, numel, packed_type(x.scalar_type()));
  check("scale", scale, s.k, accumulator(x.scalar_type()));
  check("shift", shift, s.k, accumulator(x.scalar_type()));
}

ConvCall prepare_packed(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const Tensor& shift, const OptionalTensor& residual,
                        IntArrayRef weight_shape, const ConvGeometry& g, Activation activation) {
  ConvCall call;
  call.args.shape = conv_shape(op, x, weight_shape, g.stride, g.padding, g.dilation, g.groups);
  check_packed(op, call.args.shape, x, packed, scale, shift);
  call.packed = packed.contiguous();
  call.scale = scale.contiguous();
  call.shift = shift.contiguous();
  call.args.packed = call.packed.const_data_ptr();
  call.args.scale = call.scale.const_data_ptr();
  call.args.shift = call.shift.const_data_ptr();
  call.dtype = dtype_of(x.scalar_type());
  bind_maps(op, call, x, residual, activation);
  return call;
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv_bn_add_relu", FR_BOX(conv_bn_add_relu_cpu));
  m.impl("conv_bn_add_relu_packed", FR_BOX(conv_bn_add_relu_packed_cpu));
}

}  // namespace fr
