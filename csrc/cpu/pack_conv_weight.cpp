#include "pack_conv_weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../checks.h"
#include "conv_driver.h"
#include "folding.h"

namespace fr {

at::Tensor pack_weight(const at::Tensor& weight, const ConvShape& shape) {
  const DType dtype = dtype_of(weight.scalar_type());
  const Kernels& k = kernels().of[dtype];
  const at::Tensor packed =
      at::empty({k.packed_numel(shape)}, weight.options().dtype(packed_type(weight.scalar_type())));
  const bool taps_outside = weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor source = taps_outside ? weight : weight.contiguous();
  const int64_t panel = kernels().panel[dtype];
  const int64_t panels = shape.groups * ((shape.group_k() + panel - 1) / panel);
  at::parallel_for(0, panels, std::max<int64_t>(1, 16 * 1024 / (panel * shape.depth())),
                   [&](int64_t begin, int64_t end) {
                     k.pack(shape, !taps_outside, source.const_data_ptr(), begin, end,
                            packed.mutable_data_ptr());
                   });
  return packed;
}

namespace {

ConvShape weight_shape(const char* op, at::IntArrayRef sizes, int64_t groups) {
  TORCH_CHECK_VALUE(
      sizes.size() == 4 && sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0 && sizes[3] > 0, op,
      ": weight: expected 4 positive sizes (K, C / groups, kh, kw), got ", sizes);
  TORCH_CHECK_VALUE(groups >= 1 && sizes[0] % groups == 0, op,
                    ": groups: expected a divisor of the ", sizes[0], " output channels, got ",
                    groups);
  ConvShape s{};
  s.k = sizes[0];
  s.c = sizes[1] * groups;
  s.kh = sizes[2];
  s.kw = sizes[3];
  s.groups = groups;
  return s;
}

at::Tensor pack_conv_weight_cpu(const at::Tensor& weight, int64_t groups) {
  return pack_weight(weight, weight_shape("pack_conv_weight", weight.sizes(), groups));
}

at::Tensor unpack_conv_weight_cpu(const at::Tensor& packed, at::IntArrayRef sizes, int64_t groups) {
  const char* op = "unpack_conv_weight";
  const ConvShape s = weight_shape(op, sizes, groups);
  const at::ScalarType type = packed.scalar_type();
  TORCH_CHECK_TYPE(type != at::kHalf && packed_type(type) == type, op,
                   ": packed: expected a dtype that pack_conv_weight returns here, got ", type);
  const Kernels& k = kernels().of[dtype_of(type)];
  const int64_t numel = k.packed_numel(s);
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.size(0) == numel, op, ": packed: expected shape [",
                    numel, "] for weight ", sizes, ", got ", packed.sizes());
  const at::Tensor weight = at::empty(sizes, packed.options());
  const at::Tensor source = packed.contiguous();
  k.unpack(s, source.const_data_ptr(), weight.mutable_data_ptr());
  return weight;
}

// An empty tensor where Winograd's algorithm cannot compute the convolution.
at::Tensor transform_conv_weight_cpu(const at::Tensor& weight, at::IntArrayRef stride,
                                     at::IntArrayRef dilation, int64_t groups) {
  const char* op = "transform_conv_weight";
  ConvShape s = weight_shape(op, weight.sizes(), groups);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "dilation", dilation, 1);
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  if (weight.scalar_type() != at::kFloat || !winograd_fits(s)) {
    return at::empty({0}, weight.options());
  }
  const at::Tensor transformed = at::empty({kWinogradPoints * s.k * s.c}, weight.options());
  const WeightStrides strides{weight.stride(0), weight.stride(1), weight.stride(2),
                              weight.stride(3)};
  const KernelTable& table = kernels();
  at::parallel_for(0, s.k / table.panel[kFloat32], 1, [&](int64_t begin, int64_t end) {
    table.winograd.pack(s, strides, weight.const_data_ptr<float>(), begin, end,
                        transformed.mutable_data_ptr<float>());
  });
  return transformed;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("pack_conv_weight", &pack_conv_weight_cpu);
  m.impl("unpack_conv_weight", &unpack_conv_weight_cpu);
  m.impl("transform_conv_weight", &transform_conv_weight_cpu);
}

}  // namespace fr
