#include "bn_passes.h"

#include "../tensor.h"
#include "conv_bn_add_relu.h"
#include "result_cache.h"
#include "training/passes.h"

namespace fr {
namespace {

const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Mean and biased variance of each channel, float64.
std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x) {
  const RowBlocks blocks(rows_of(x), x.size(1));
  PartialSums partial(blocks.count(), kStatisticsRows, x.size(1));
  const Statistics args{x.size(1), x.const_data_ptr(), partial.data()};
  const auto kernel = training_kernels_of(x).statistics;
  for_row_blocks(x, kStatisticsRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernel(args, begin, end, block, near);
  });
  return partial.statistics([&](int64_t i) { return blocks.size(i); }, ScalarType::Double);
}

}  // namespace

bool has_bn_passes(const Tensor& x, MemoryFormat format) {
  return format == kChannelsLast && x.scalar_type() == ScalarType::Float && x.numel() > 0;
}

std::tuple<Tensor, Tensor, Tensor> bn_forward_passes(const Tensor& x, const OptionalTensor& weight,
                                                     const OptionalTensor& bias,
                                                     const OptionalTensor& running_mean,
                                                     const OptionalTensor& running_var,
                                                     const Tensor& residual, bool training,
                                                     double eps, Activation activation) {
  Tensor mean = empty({0}, ScalarType::Float), var = empty({0}, ScalarType::Float);
  if (training) std::tie(mean, var) = batch_statistics(x);
  const auto affine = fold(std::nullopt, weight, bias, training ? mean : *running_mean,
                           training ? var : *running_var, eps)
                          .stored(ScalarType::Float);
  const Tensor y = empty_map(x.sizes(), x.options());
  BlockEnd args{};
  args.rows = rows_of(x);
  args.channels = x.size(1);
  args.z = x.const_data_ptr();
  args.scale = affine.get();
  args.shift = affine.get() + args.channels * static_cast<int64_t>(sizeof(float));
  args.shortcut = data_or_null(residual);
  args.y = y.mutable_data_ptr();
  args.activation = activation;
  const auto kernel = training_kernels_of(x).block_end;
  for_rows(x, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {y, mean.to(ScalarType::Float), var.to(ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_backward_passes(
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& var, bool training, double eps, Activation activation,
    bool need_residual) {
  const int64_t channels = x.size(1);
  const Tensor dx = empty_map(x.sizes(), x.options());
  // The gradient of the activation's argument is the residual's; where that is not needed, it is
  // stored where the gradient of x will be.
  Tensor dresidual = empty({0}, x.options()), g = grad;
  if (y.defined()) {
    g = need_residual ? empty_map(x.sizes(), x.options()) : dx;
    if (need_residual) dresidual = g;
  } else if (need_residual) {
    dresidual = grad.clone(kChannelsLast);
  }
  const TrainingKernels& kernels = training_kernels_of(x);
  const Tensor center = mean.to(ScalarType::Float).contiguous();
  const RowBlocks blocks(rows_of(x), channels);
  PartialSums partial(blocks.count(), kBlockEndRows, channels);
  BlockEndBackward sums{};
  sums.rows = rows_of(x);
  sums.channels = channels;
  sums.dy = grad.const_data_ptr();
  sums.y = data_or_null(y);
  sums.activation = activation;
  sums.z = x.const_data_ptr();
  sums.mean = center.const_data_ptr();
  sums.g = y.defined() ? g.mutable_data_ptr() : nullptr;
  sums.sums = partial.data();
  for_row_blocks(x, kBlockEndRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
    kernels.block_end_backward(sums, begin, end, block, near);
  });

  const Tensor sum_g = partial.total(kSumG, ScalarType::Double);
  const std::vector<double> s1 = numbers(sum_g, channels, 0);
  const std::vector<double> s2 = numbers(partial.total(kSumGXc, ScalarType::Double), channels, 0);
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
  const Tensor a = as_tensor(slope, ScalarType::Float), b = as_tensor(of_x, ScalarType::Float);
  const Tensor c = as_tensor(constant, ScalarType::Float);
  const BnGradient args{channels,
                        g.const_data_ptr(),
                        training ? x.const_data_ptr() : nullptr,
                        a.const_data_ptr(),
                        training ? b.const_data_ptr() : nullptr,
                        training ? c.const_data_ptr() : nullptr,
                        dx.mutable_data_ptr()};
  for_rows(x, [&](int64_t begin, int64_t end) { kernels.bn_gradient(args, begin, end); });
  return {dx, as_tensor(dweight, ScalarType::Float), sum_g.to(ScalarType::Float), dresidual};
}

}  // namespace fr
