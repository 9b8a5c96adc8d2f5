// What batch norm computes from its sums, per channel and in float64: the forward's scale and
// shift, the running statistics, and the affine gradient.

#include "../../box.h"
#include "operands.h"

namespace fr {
namespace {

// mean and var, and weight and bias where there are: vectors of one length on a CPU.
int64_t check_vectors(const char* op, const Tensor& mean,
                      std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
  FR_CHECK_VALUE(mean.dim() == 1, op, ": mean: expected 1 dimension, got ", mean.sizes());
  FR_CHECK_TYPE(mean.scalar_type() == ScalarType::Float || mean.scalar_type() == ScalarType::Double,
                op, ": mean: expected dtype float32 or float64, got ", mean.scalar_type());
  check_storage(op, "mean", mean);
  for (const auto& [name, t] : others) {
    check_vector(op, name, t, mean.size(0), mean);
    if (t) check_storage(op, name, *t);
  }
  return mean.size(0);
}

void check_count(const char* op, int64_t count) {
  FR_CHECK_VALUE(count >= 0, op, ": count: expected an int >= 0, got ", count);
}

std::tuple<Tensor, Tensor> bn_coefficients_cpu(const Tensor& mean, const Tensor& var,
                                               const OptionalTensor& weight,
                                               const OptionalTensor& bias, double eps) {
  check_vectors("bn_coefficients", mean, {{"var", var}, {"weight", weight}, {"bias", bias}});
  const FoldedBatchNorm f = fold(std::nullopt, weight, bias, mean, var, eps);
  return {as_tensor(f.scale, mean.scalar_type()), as_tensor(f.shift, mean.scalar_type())};
}

// running = running + momentum * (batch - running), with the unbiased variance.
void bn_update_running_cpu(const Tensor& mean, const Tensor& var, const Tensor& running_mean,
                           const Tensor& running_var, double momentum, int64_t count) {
  const char* op = "bn_update_running";
  const int64_t c = check_vectors(
      op, mean, {{"var", var}, {"running_mean", running_mean}, {"running_var", running_var}});
  check_count(op, count);
  FR_CHECK_VALUE(count != 1, op, ": count: expected more than 1 value per channel, got 1");
  if (count == 0) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  const auto update = [&](const Tensor& running, const Tensor& batch, double factor) {
    const std::vector<double> now = numbers(batch, c, 0);
    with_element(running.scalar_type(), [&](auto element) {
      auto* const p = running.mutable_data_ptr<decltype(element)>();
      const int64_t step = running.stride(0);
      for (int64_t i = 0; i < c; ++i) {
        const double old = static_cast<double>(p[i * step]);
        p[i * step] = static_cast<decltype(element)>(old + momentum * (now[i] * factor - old));
      }
    });
  };
  update(running_mean, mean, 1);
  update(running_var, var, unbiased);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_backward_coefficients_cpu(
    const Tensor& sum_g, const Tensor& sum_g_xc, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, double eps, int64_t count) {
  const char* op = "bn_backward_coefficients";
  const int64_t c = check_vectors(
      op, mean, {{"sum_g", sum_g}, {"sum_g_xc", sum_g_xc}, {"var", var}, {"weight", weight}});
  check_count(op, count);
  const std::vector<double> g = numbers(sum_g, c, 0), g_xc = numbers(sum_g_xc, c, 0);
  const std::vector<double> center = numbers(mean, c, 0);
  const std::vector<double> invstd = bn_scale(std::nullopt, var, eps);
  const std::vector<double> a = bn_scale(weight, var, eps);
  std::vector<double> b(a.size()), shift(a.size()), dweight(a.size());
  const double m = static_cast<double>(count);
  for (size_t i = 0; i < a.size(); ++i) {
    b[i] = count > 0 ? -a[i] * invstd[i] * invstd[i] * g_xc[i] / m : 0;
    shift[i] = (count > 0 ? -a[i] * g[i] / m : 0) - b[i] * center[i];
    dweight[i] = g_xc[i] * invstd[i];
  }
  const ScalarType type = mean.scalar_type();
  return {as_tensor(a, type), as_tensor(b, type), as_tensor(shift, type), as_tensor(dweight, type),
          as_tensor(g, type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("bn_coefficients", FR_BOX(bn_coefficients_cpu));
  m.impl("bn_update_running", FR_BOX(bn_update_running_cpu));
  m.impl("bn_backward_coefficients", FR_BOX(bn_backward_coefficients_cpu));
}

}  // namespace fr
