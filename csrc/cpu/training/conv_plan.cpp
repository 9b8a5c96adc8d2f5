#include "conv_plan.h"

#include <string_view>

namespace fr {
namespace {

// Whether PyTorch multiplies this type so fast that float32 sums can't compete: AMX does bfloat16
// at 3 to 4 times the float32 peak in a whole convolution (measured), Winograd's algorithm at 2
// to 2.5.
bool has_fast_products(DType dtype) {
  return dtype == kBFloat16 && std::string_view(kernels().isa) == "amx";
}

bool fits(const TrainingConv& conv, const ConvShape& s) {
  return conv.fits != nullptr && conv.fits(s);
}

bool is_pointwise(const ConvShape& s) {
  return s.kh == 1 && s.kw == 1 && s.pad_h == 0 && s.pad_w == 0;
}

// The algorithm for this geometry, if the instruction set has it. Direct sums only where PyTorch's
// have no better ones: where there are few products for each element that is moved, and where its
// kernels are far from the peak (strides).
const TrainingConv* algorithm_for(DType dtype, const ConvShape& s, bool winograd) {
  const TrainingKernels& k = training_kernels().of[dtype];
  if (s.n == 0) return nullptr;
  if (winograd && !has_fast_products(dtype) && fits(k.winograd, s)) return &k.winograd;
  const bool direct = is_pointwise(s) || s.stride_h * s.stride_w > 1;
  return direct && fits(k.direct, s) ? &k.direct : nullptr;
}

// Whether to read dz once for both gradients pays, where there is a kernel for that: for 1x1 in
// blocks of pixels that are not too short beside the weight.
bool in_one_pass(const ConvShape& s) {
  return is_pointwise(s) && s.stride_h * s.stride_w == 1 && s.k <= 512;
}

template <class Args>
bool has(const TrainingConv* conv, const BlockKernel<Args> TrainingConv::* direction) {
  return conv != nullptr && (conv->*direction).blocks != nullptr;
}

}  // namespace

const TrainingConv* plan_forward(DType dtype, const ConvShape& s, bool winograd) {
  const TrainingConv* conv = algorithm_for(dtype, s, winograd);
  return has(conv, &TrainingConv::forward) ? conv : nullptr;
}

BackwardPlan plan_backward(DType dtype, const ConvShape& s, bool need_input, bool need_weight,
                           bool winograd) {
  const TrainingConv* conv = algorithm_for(dtype, s, winograd);
  BackwardPlan plan{};
  if (need_input && has(conv, &TrainingConv::data_gradient)) plan.data = conv;
  if (need_weight && has(conv, &TrainingConv::weight_gradient)) plan.weight = conv;
  plan.one_pass =
      need_input && need_weight && has(conv, &TrainingConv::both_gradients) && in_one_pass(s);
  if (plan.one_pass) plan.data = plan.weight = conv;
  return plan;
}

}  // namespace fr
