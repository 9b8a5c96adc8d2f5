#include "conv_plan.h"

namespace fr {
namespace {

// The algorithm for this geometry, if the instruction set has it.
const TrainingConv* algorithm_for(DType dtype, const ConvShape& s, bool winograd) {
  const TrainingKernels& k = training_kernels().of[dtype];
  if (s.n == 0) return nullptr;
  for (const TrainingConv* conv : {&k.pointwise, &k.strided, winograd ? &k.winograd : nullptr}) {
    if (conv != nullptr && conv->fits != nullptr && conv->fits(s)) return conv;
  }
  return nullptr;
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
  plan.one_pass = need_input && need_weight && has(conv, &TrainingConv::both_gradients);
  if (plan.one_pass) plan.data = plan.weight = conv;
  return plan;
}

}  // namespace fr
