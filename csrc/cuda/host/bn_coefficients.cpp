// What batch norm computes from its sums: the forward's scale and shift, the running statistics,
// and the affine gradient.
#include <initializer_list>
#include <limits>
#include <tuple>
#include <utility>

#include "../block_end.h"
#include "context.h"
#include "operands.h"
#include "training_operands.h"

namespace fr {
namespace {

// Vectors of one length and device: float32, but for the batch norm's weight and bias.
class VectorCall {
 public:
  VectorCall(const char* op, const Tensor& mean) : op_(op), mean_(mean), scope_(mean) {
    check_storage(op, "mean", mean);
    FR_CHECK_VALUE(mean.dim() == 1, op, ": mean: expected 1 dimension, got ", mean.sizes());
    FR_CHECK_VALUE(mean.numel() <= std::numeric_limits<int>::max() - 256, op,
                   ": mean: expected less channels, got ", mean.numel());
    check_floats(op, "mean", mean, mean.size(0), mean);
  }

  int channels() const { return static_cast<int>(mean_.numel()); }
  const float* floats(const char* name, const Tensor& v) {
    check_floats(op_, name, v, channels(), mean_);
    return operands_.floats(v);
  }
  const float* parameter(const char* name, const OptionalTensor& v) {
    check_vector(op_, name, v, channels(), mean_);
    return operands_.floats(v);
  }
  Tensor result() const { return device_empty({channels()}, mean_.options()); }

  template <class Params>
  void launch(cudaError_t (*kernel)(const Params&, cudaStream_t), Params params) const {
    params.channels = channels();
    if (channels() > 0) check_launch(op_, kernel(params, scope_.stream()));
  }

 private:
  const char* op_;
  Tensor mean_;
  Operands operands_;
  DeviceScope scope_;
};

void check_count(const char* op, int64_t count) {
  FR_CHECK_VALUE(count >= 0, op, ": count: expected an int >= 0, got ", count);
}

std::tuple<Tensor, Tensor> bn_coefficients_cuda(const Tensor& mean, const Tensor& var,
                                                const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps) {
  VectorCall call("bn_coefficients", mean);
  const Tensor scale = call.result(), shift = call.result();
  BnCoefficientsParams p{};
  p.mean = call.floats("mean", mean);
  p.var = call.floats("var", var);
  p.weight = call.parameter("weight", weight);
  p.bias = call.parameter("bias", bias);
  p.scale = scale.mutable_data_ptr<float>();
  p.shift = shift.mutable_data_ptr<float>();
  p.eps = eps;
  call.launch(bn_coefficients, p);
  return {scale, shift};
}

// The running statistics are float32; others are PyTorch's to update.
void bn_update_running_cuda(const Tensor& mean, const Tensor& var, const Tensor& running_mean,
                            const Tensor& running_var, double momentum, int64_t count) {
  const char* op = "bn_update_running";
  VectorCall call(op, mean);
  check_floats(op, "running_mean", running_mean, call.channels(), mean);
  check_floats(op, "running_var", running_var, call.channels(), mean);
  check_count(op, count);
  FR_CHECK_VALUE(count != 1, op, ": count: expected more than 1 value per channel, got 1");
  BnUpdateRunningParams p{};
  p.mean = call.floats("mean", mean);
  p.var = call.floats("var", var);
  if (count == 0) return;
  p.running_mean = running_mean.mutable_data_ptr<float>();
  p.running_var = running_var.mutable_data_ptr<float>();
  p.mean_step = running_mean.stride(0);
  p.var_step = running_var.stride(0);
  p.momentum = momentum;
  p.unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  call.launch(bn_update_running, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_backward_coefficients_cuda(
    const Tensor& sum_g, const Tensor& sum_g_xc, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, double eps, int64_t count) {
  const char* op = "bn_backward_coefficients";
  VectorCall call(op, mean);
  check_count(op, count);
  const Tensor a = call.result(), b = call.result(), c = call.result();
  const Tensor dweight = call.result(), dbias = call.result();
  BnBackwardCoefficientsParams p{};
  p.sum_g = call.floats("sum_g", sum_g);
  p.sum_g_xc = call.floats("sum_g_xc", sum_g_xc);
  p.mean = call.floats("mean", mean);
  p.var = call.floats("var", var);
  p.weight = call.parameter("weight", weight);
  p.a = a.mutable_data_ptr<float>();
  p.b = b.mutable_data_ptr<float>();
  p.c = c.mutable_data_ptr<float>();
  p.dweight = dweight.mutable_data_ptr<float>();
  p.dbias = dbias.mutable_data_ptr<float>();
  p.count = static_cast<double>(count > 0 ? count : 1);
  p.eps = eps;
  call.launch(bn_backward_coefficients, p);
  return {a, b, c, dweight, dbias};
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("bn_coefficients", FR_BOX(bn_coefficients_cuda));
  m.impl("bn_update_running", FR_BOX(bn_update_running_cuda));
  m.impl("bn_backward_coefficients", FR_BOX(bn_backward_coefficients_cuda));
}

}  // namespace fr
