// z = conv(p(x), weight) and the batch statistics of z.

#include "../../box.h"
#include "../conv_bn_add_relu.h"
#include "../result_cache.h"
#include "conv_plan.h"
#include "conv_run.h"
#include "operands.h"
#include "passes.h"

namespace fr {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors with_statistics(const Tensor& z) {
  const int64_t c = z.size(1);
  const RowBlocks blocks(rows_of(z), c);
  PartialSums partial(blocks.count(), kStatisticsRows, c);
  const Statistics args{c, z.const_data_ptr(), partial.data()};
  const auto kernel = training_kernels_of(z).statistics;
  for_row_blocks(z, kStatisticsRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernel(args, begin, end, block, near);
  });
  const auto [mean, var] =
      partial.statistics([&](int64_t i) { return blocks.size(i); }, accumulator(z.scalar_type()));
  return {z, mean, var};
}

ThreeTensors without_statistics(const Tensor& z) {
  // An operator must not return one tensor twice, not even an empty one.
  const auto type = accumulator(z.scalar_type());
  return {z, empty({0}, type), empty({0}, type)};
}

ThreeTensors by_kernel(const TrainingConv& conv, TrainingForward args, const Tensor& x,
                       const Tensor& weight, bool statistics) {
  const ConvShape& s = args.shape;
  const PackedWeight packed(s, weight, x.scalar_type(), conv.packed_bytes, conv.pack_units,
                            conv.pack_forward);
  const Tensor z = empty_map({s.n, s.k, s.out_h(), s.out_w()}, x.options());
  args.weight = packed.data();
  args.filter = packed.source();
  args.z = z.mutable_data_ptr();
  PartialSums partial(statistics ? conv.forward.blocks(s) : 0, kStatisticsRows, s.k);
  if (statistics) args.sums = partial.data();
  run_kernel(conv.forward, args);
  if (!statistics) return without_statistics(z);
  const auto [mean, var] = partial.statistics([&](int64_t i) { return conv.forward.pixels(s, i); },
                                              accumulator(x.scalar_type()));
  return {z, mean, var};
}

// `library`: the convolution is PyTorch's, whatever the model of cost says.
ThreeTensors run_conv_forward(bool library, const Tensor& x, const OptionalTensor& x_scale,
                              const OptionalTensor& x_shift, const Tensor& weight,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                              int64_t groups, bool statistics, bool winograd,
                              Activation activation) {
  const char* op = "conv_forward";
  Tensor map = map_operand(op, "x", x);
  const ConvShape s = training_shape(op, map, weight, stride, padding, dilation, groups);
  check_together(op, "x_scale", x_scale, "x_shift", x_shift);
  Tensor scale, shift;
  if (x_scale) {
    scale = vector_operand(op, "x_scale", *x_scale, s.c, map);
    shift = vector_operand(op, "x_shift", *x_shift, s.c, map);
  }
  if (x_scale && activation != Activation::kReLU) {  // the kernels' prologue has ReLU only
    map = normalized(map, scale, shift, activation);
    scale = shift = Tensor();
  }
  const DType dtype = dtype_of(map.scalar_type());
  if (const TrainingConv* conv = library ? nullptr : plan_forward(dtype, s, winograd)) {
    TrainingForward args{};
    args.shape = s;
    args.x = map.const_data_ptr();
    args.x_scale = data_or_null(scale);
    args.x_shift = data_or_null(shift);
    return by_kernel(*conv, args, map, weight, statistics);
  }
  const Tensor input = scale.defined() ? normalized(map, scale, shift, activation) : map;
  const Tensor w = as_type(weight, map.scalar_type());
  const Tensor z =
      !library && is_direct_forward(dtype, s)
          ? direct_convolution(op, input, w, {stride, padding, dilation, groups})
          : convolution(input, w, stride, padding, dilation, groups).contiguous(kChannelsLast);
  return statistics ? with_statistics(z) : without_statistics(z);
}

template <bool kLibrary>
ThreeTensors conv_forward_cpu(const Tensor& x, const OptionalTensor& x_scale,
                              const OptionalTensor& x_shift, const Tensor& weight,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                              int64_t groups, bool statistics, bool winograd,
                              Activation activation) {
  return run_conv_forward(kLibrary, x, x_scale, x_shift, weight, stride, padding, dilation, groups,
                          statistics, winograd, activation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv_forward", FR_BOX(conv_forward_cpu<false>));
  m.impl("conv_forward_library", FR_BOX(conv_forward_cpu<true>));
}

}  // namespace fr
