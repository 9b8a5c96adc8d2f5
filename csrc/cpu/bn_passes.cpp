#include "bn_passes.h"

#include <ATen/ATen.h>

#include "conv_bn_add_relu.h"
#include "result_cache.h"
#include "training/passes.h"

namespace fr {
namespace {

const void* data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Mean and biased variance of each channel, float64.
std::tuple<at::Tensor, at::Tensor> batch_statistics(const at::Tensor& x) {
  const RowBlocks blocks(rows_of(x), x.size(1));
  PartialSums partial(blocks.count(), kStatisticsRows, x.size(1));
  const Statistics args{x.size(1), x.const_data_ptr(), partial.data()};
  const auto kernel = training_kernels_of(x).statistics;
  for_row_blocks(x, kStatisticsRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernel(args, begin, end, block, near);
  });
  return partial.statistics([&](int64_t i) { return blocks.size(i); }, at::kDouble);
}

}  // namespace

bool has_bn_passes(const at::Tensor& x, at::MemoryFormat format) {
  return format == kChannelsLast && x.scalar_type() == at::kFloat && x.numel() > 0;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_forward_passes(
    const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const at::Tensor& residual, bool training, double eps, bool relu) {
  at::Tensor mean = at::empty({0}, at::kFloat), var = at::empty_like(mean);
  if (training) std::tie(mean, var) = batch_statistics(x);
  const Folded affine = fold(std::nullopt, weight, bias, training ? mean : *running_mean,
                             training ? var : *running_var, eps, at::kFloat);
  const at::Tensor y = empty_map(x.sizes(), x.options());
  BlockEnd args{};
  args.channels = x.size(1);
  args.z = x.const_data_ptr();
  args.scale = affine.scale.const_data_ptr();
  args.shift = affine.shift.const_data_ptr();
  args.shortcut = data_or_null(residual);
  args.y = y.mutable_data_ptr();
  args.relu = relu;
  const auto kernel = training_kernels_of(x).block_end;
  for_rows(x, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {y, mean.to(at::kFloat), var.to(at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_backward_passes(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, const OptionalTensor& weight,
    const at::Tensor& mean, const at::Tensor& var, bool training, double eps, bool need_residual) {
  const int64_t channels = x.size(1);
  const at::Tensor dx = empty_map(x.sizes(), x.options());
  // The gradient behind ReLU is the residual's; else it lies where that of x will.
  at::Tensor dresidual = at::empty({0}, x.options()), g = grad;
  if (y.defined()) {
    g = need_residual ? empty_map(x.sizes(), x.options()) : dx;
    if (need_residual) dresidual = g;
  } else if (need_residual) {
    dresidual = grad.clone(kChannelsLast);
  }
  const TrainingKernels& kernels = training_kernels_of(x);
  const at::Tensor center = mean.to(at::kFloat).contiguous();
  const RowBlocks blocks(rows_of(x), channels);
  PartialSums partial(blocks.count(), kBlockEndRows, channels);
  BlockEndBackward sums{};
  sums.channels = channels;
  sums.dy = grad.const_data_ptr();
  sums.y = data_or_null(y);
  sums.z = x.const_data_ptr();
  sums.mean = center.const_data_ptr();
  sums.g = y.defined() ? g.mutable_data_ptr() : nullptr;
  sums.sums = partial.data();
  for_row_blocks(x, kBlockEndRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernels.block_end_backward(sums, begin, end, block, near);
  });

  const at::Tensor sum_g = partial.total(kSumG, at::kDouble);
  const std::vector<double> s1 = numbers(sum_g, channels, 0);
  const std::vector<double> s2 = numbers(partial.total(kSumGXc, at::kDouble), channels, 0);
  const std::vector<double> invstd = bn_scale(std::nullopt, var, eps);
  const std::vector<double> slope = bn_scale(weight, var, eps),
                            at_mean = numbers(mean, channels, 0);
  std::vector<double> of_x(slope.size()), constant(slope.size()), dweight(slope.size());
  const double count = static_cast<double>(rows_of(x));
  for (size_t i = 0; i < slope.size(); ++i) {
    of_x[i] = -slope[i] * invstd[i] * invstd[i] * s2[i] / count;
    constant[i] = -slope[i] * s1[i] / count - of_x[i] * at_mean[i];
    dweight[i] = s2[i] * invstd[i];
  }
  const at::Tensor a = as_tensor(slope, at::kFloat), b = as_tensor(of_x, at::kFloat);
  const at::Tensor c = as_tensor(constant, at::kFloat);
  const BnGradient args{channels,
                        g.const_data_ptr(),
                        training ? x.const_data_ptr() : nullptr,
                        a.const_data_ptr(),
                        training ? b.const_data_ptr() : nullptr,
                        training ? c.const_data_ptr() : nullptr,
                        dx.mutable_data_ptr()};
  for_rows(x, [&](int64_t begin, int64_t end) { kernels.bn_gradient(args, begin, end); });
  return {dx, as_tensor(dweight, at::kFloat), sum_g.to(at::kFloat), dresidual};
}

}  // namespace fr
