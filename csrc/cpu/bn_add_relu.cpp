
#include <algorithm>
#include <tuple>

#include "../box.h"
#include "../checks.h"
#include "../parallel.h"
#include "../tensor.h"
#include "bn_passes.h"
#include "folding.h"
#include "isa.h"

namespace fr {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 32 * 1024;

MapView view_of(const Tensor& x, MemoryFormat format) {
  const int64_t n = x.size(0), c = x.size(1), plane = x.size(2) * x.size(3);
  if (format == kChannelsLast) return {n * plane, c, c, true};
  return {n * c, plane, c, false};
}

int64_t grain(const MapView& map) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(map.cols, 1));
}

// Sums over a map are made in chunks: of whole rows, so many that a chunk of float32 has 64 KiB and
// no chain of additions is long (channels-last); or of one image's plane (contiguous).
struct Chunks {
  MapView map;
  int64_t rows;   // per chunk, channels-last only
  int64_t count;  // partial results per channel

  explicit Chunks(const MapView& m) : map(m) {
    rows = std::clamp<int64_t>(16 * 1024 / std::max<int64_t>(m.channels, 1), 8, 1024);
    count =
        m.channels_last ? (m.rows + rows - 1) / rows : m.rows / std::max<int64_t>(m.channels, 1);
  }

  int64_t size(int64_t chunk) const {  // elements of one channel in it
    return map.channels_last ? std::min(rows, map.rows - chunk * rows) : map.cols;
  }

  // Calls f(begin, end, chunk) for all of the map, from several threads.
  template <class F>
  void for_each(F f) const {
    if (map.channels_last) {
      const int64_t step = std::max<int64_t>(1, kGrain / std::max<int64_t>(rows * map.cols, 1));
      parallel_for(0, count, step, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i * rows, std::min((i + 1) * rows, map.rows), i);
      });
    } else {
      const int64_t per_channel = std::max<int64_t>(count * map.cols, 1);
      parallel_for(0, map.channels, std::max<int64_t>(1, kGrain / per_channel),
                   [&](int64_t begin, int64_t end) { f(begin, end, 0); });
    }
  }
};

// Mean and biased variance of each channel, float64.
std::tuple<Tensor, Tensor> batch_statistics(const Tensor& x, const MapView& map) {
  const Chunks chunks(map);
  const int64_t c = map.channels;
  const auto wide = ScalarType::Double;
  const Tensor means = empty({chunks.count, c}, wide), m2s = empty({chunks.count, c}, wide);
  const BnStatistics args{map, x.const_data_ptr(), means.mutable_data_ptr<double>(),
                          m2s.mutable_data_ptr<double>()};
  const auto kernel = kernels().of[dtype_of(x.scalar_type())].bn_statistics;
  chunks.for_each([&](int64_t begin, int64_t end, int64_t i) { kernel(args, begin, end, i); });

  // Merge (Chan, Golub and LeVeque): always in the order of the chunks.
  const Tensor mean = zeros({c}, wide), var = zeros({c}, wide);
  double* mean_of = mean.mutable_data_ptr<double>();
  double* var_of = var.mutable_data_ptr<double>();
  double total = 0;
  for (int64_t i = 0; i < chunks.count; ++i) {
    const double size = static_cast<double>(chunks.size(i));
    total += size;
    for (int64_t k = 0; k < c; ++k) {
      const double delta = args.mean[i * c + k] - mean_of[k];
      mean_of[k] += delta * size / total;
      var_of[k] += args.m2[i * c + k] + delta * delta * (total - size) * size / total;
    }
  }
  for (int64_t k = 0; k < c; ++k) var_of[k] /= total;
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bn_add_relu_cpu(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias,
                                                   const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var,
                                                   const OptionalTensor& residual, bool training,
                                                   double eps, Activation activation) {
  const char* op = "bn_add_relu";
  check_bn(op, x, weight, bias, running_mean, running_var, residual, training);
  const int64_t channels = x.size(1);

  const auto format = x.suggest_memory_format();
  const Tensor input = x.contiguous(format);
  const Tensor added = residual ? residual->contiguous(format) : Tensor();
  if (has_bn_passes(input, format)) {
    return bn_forward_passes(input, weight, bias, running_mean, running_var, added, training, eps,
                             activation);
  }
  const Tensor y = empty(input.sizes(), input.options(), format);
  const MapView map = view_of(x, format);
  const auto type = bn_arithmetic(x.scalar_type());

  Tensor mean = empty({0}, x.options()), var = empty({0}, x.options());
  if (x.numel() == 0) {
    // An empty batch has no statistics; zeros are finite in the backward, whose sums are zero.
    mean = zeros({training ? channels : 0}, accumulator(x.scalar_type()));
    return {y, mean, zeros(mean.sizes(), mean.options())};
  }
  if (training) std::tie(mean, var) = batch_statistics(input, map);
  const auto as_vector = [&](const OptionalTensor& v) {
    return as_tensor(numbers(v, channels, 0), type);
  };
  const Tensor center = as_vector(training ? OptionalTensor(mean) : running_mean);
  const Tensor scale = as_tensor(bn_scale(weight, training ? var : *running_var, eps), type);
  const Tensor offset = as_vector(bias);

  const BnForward args{map,
                       input.const_data_ptr(),
                       residual ? added.const_data_ptr() : nullptr,
                       y.mutable_data_ptr(),
                       center.const_data_ptr(),
                       scale.const_data_ptr(),
                       offset.const_data_ptr(),
                       activation};
  const auto kernel = kernels().of[dtype_of(x.scalar_type())].bn_forward;
  parallel_for(0, map.rows, grain(map),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const auto returned = accumulator(x.scalar_type());
  return {y, mean.to(returned), var.to(returned)};
}

// With known batch statistics the forward of training is that of inference. It is an operator of
// its own because the gradients differ: in training the statistics depend on x.
Tensor bn_add_relu_apply_cpu(const Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                             const OptionalTensor& residual, double eps, Activation activation) {
  return std::get<0>(bn_add_relu_cpu(x, weight, bias, mean, var, residual, false, eps, activation));
}

// Returns the gradients of x, weight, bias and, if wanted, of the residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cpu(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& var, bool training, double eps, Activation activation,
    bool need_residual) {
  const char* op = "bn_add_relu_backward";
  check_bn_backward(op, grad, x, y, weight, mean, var, activation);
  const int64_t channels = x.size(1);

  const auto format = x.suggest_memory_format();
  const Tensor input = x.contiguous(format), gradient = grad.contiguous(format);
  const bool activated = activation != Activation::kNone;
  const Tensor output = activated ? y->contiguous(format) : Tensor();
  if (has_bn_passes(input, format)) {
    return bn_backward_passes(gradient, input, output, weight, mean, var, training, eps, activation,
                              need_residual);
  }
  const Tensor dx = empty(input.sizes(), input.options(), format);
  const Tensor dresidual = need_residual ? empty_like(dx) : empty({0}, x.options());
  const auto returned = accumulator(x.scalar_type());
  if (x.numel() == 0) {
    const Tensor zero = zeros({channels}, returned);
    return {dx, zero, zeros({channels}, returned), dresidual};
  }
  const MapView map = view_of(x, format);
  const Chunks chunks(map);
  const auto type = bn_arithmetic(x.scalar_type());
  const auto wide = ScalarType::Double;
  const Tensor center = mean.to(type).contiguous();
  const Tensor sums = zeros({2, chunks.count, channels}, wide);

  BnBackward args{};
  args.map = map;
  args.grad = gradient.const_data_ptr();
  args.x = input.const_data_ptr();
  args.y = activated ? output.const_data_ptr() : nullptr;
  args.activation = activation;
  args.mean = center.const_data_ptr();
  args.sum_dz = sums.mutable_data_ptr<double>();
  args.sum_dz_xc = args.sum_dz + chunks.count * channels;
  args.dz = need_residual ? dresidual.mutable_data_ptr() : nullptr;
  args.dx = dx.mutable_data_ptr();
  const Kernels& kernel = kernels().of[dtype_of(x.scalar_type())];
  chunks.for_each([&](int64_t begin, int64_t end, int64_t i) {
    kernel.bn_backward_reduce(args, begin, end, i);
  });

  const Tensor totals = sum(sums, 1);
  const std::vector<double> invstd = bn_scale(std::nullopt, var, eps);
  const std::vector<double> scale = bn_scale(weight, var, eps);
  std::vector<double> slope(invstd.size()), constant(invstd.size()), dweight(invstd.size());
  const double* s1 = totals.const_data_ptr<double>();
  const double* s2 = s1 + channels;
  const double count = static_cast<double>(x.numel()) / static_cast<double>(channels);
  for (size_t i = 0; i < invstd.size(); ++i) {
    slope[i] = -scale[i] * invstd[i] * invstd[i] * s2[i] / count;
    constant[i] = -scale[i] * s1[i] / count;
    dweight[i] = s2[i] * invstd[i];
  }
  const Tensor a = as_tensor(scale, type);
  const Tensor b = as_tensor(slope, type), c = as_tensor(constant, type);
  args.a = a.const_data_ptr();
  args.b = training ? b.const_data_ptr() : nullptr;
  args.c = c.const_data_ptr();
  parallel_for(0, map.rows, grain(map),
               [&](int64_t begin, int64_t end) { kernel.bn_backward_apply(args, begin, end); });
  return {dx, as_tensor(dweight, returned), as_tensor({s1, s2}, returned), dresidual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("bn_add_relu", FR_BOX(bn_add_relu_cpu));
  m.impl("bn_add_relu_apply", FR_BOX(bn_add_relu_apply_cpu));
  m.impl("bn_add_relu_backward", FR_BOX(bn_add_relu_backward_cpu));
}

}  // namespace fr
