#include "conv_plan.h"

#include <string_view>

namespace fr {
namespace {

// Whether PyTorch multiplies this type so fast that no sum here can compete: AMX does bfloat16 at 3
// to 4 times the float32 peak in a whole convolution (measured), Winograd's algorithm at 2 to 2.5,
// and pairs at up to 2.
bool has_fast_products(DType dtype) {
  return dtype == kBFloat16 && std::string_view(kernels().isa) == "amx";
}

bool fits(const TrainingConv& conv, const ConvShape& s) {
  return conv.fits != nullptr && conv.fits(s);
}

bool is_pointwise(const ConvShape& s) {
  return s.kh == 1 && s.kw == 1 && s.pad_h == 0 && s.pad_w == 0;
}

bool is_strided(const ConvShape& s) { return s.stride_h * s.stride_w > 1; }

// The algorithm for this geometry, if the instruction set has it. Direct sums only where PyTorch's
// have no better ones: where there are few products for each element that is moved, and where its
// kernels are far from the peak (strides).
const TrainingConv* algorithm_for(DType dtype, const ConvShape& s, bool winograd) {
  const TrainingKernels& k = training_kernels().of[dtype];
  if (s.n == 0 || has_fast_products(dtype)) return nullptr;
  if (winograd && fits(k.winograd, s)) return &k.winograd;
  return (is_pointwise(s) || is_strided(s)) && fits(k.direct, s) ? &k.direct : nullptr;
}

// Whether an algorithm's data gradient is faster than PyTorch's with the passes around it. That of
// a 3x3 of stride 2 copies each pixel of dz 9 times, for as many products as the input has
// channels: with 64 of them PyTorch's takes 0.85 of the time, with 128 and more 1 to 1.2 times
// (measured, Zen 4, AVX-512, float32, batch 16).
bool has_fast_data_gradient(const ConvShape& s) {
  return is_pointwise(s) || !is_strided(s) || s.c >= 128;
}

// Whether reading dz once for both gradients pays off, where there is a kernel for it: for 1x1 in
// blocks of pixels that are not too short compared to the weight. dz is recomputed for each 256
// channels of the input, which costs 5% with 2048.
bool in_one_pass(const ConvShape& s) {
  return is_pointwise(s) && !is_strided(s) && s.k <= 512 && s.c <= 1024;
}

// Whether the weight gradient of few channels has a kernel that is faster than PyTorch's with the
// passes around it: 24 to 30 ms for a network's 7x7 at batch 16 (measured, Zen 4). By pairs of
// bfloat16 PyTorch's takes 14 for 22.
bool has_fast_terms(DType dtype, const ConvShape& s) {
  const bool pairs =
      dtype == kBFloat16 && packed_type(ScalarType::BFloat16) == ScalarType::BFloat16;
  return s.n > 0 && !pairs && fits(training_kernels().of[dtype].few_channels, s);
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

// Where it is faster (measured, Zen 4, AVX-512): of an image, 1.8 to 2.8 times for a network's
// first layer, and for groups of 4 and 8 channels, 1.04 to 3.6 times in float32 and 0.4 in
// bfloat16.
bool is_direct_forward(DType dtype, const ConvShape& s) {
  const int64_t channels = s.c / s.groups;
  if (has_fast_products(dtype)) return false;
  if (s.groups == 1) return channels <= 4;
  return (dtype == kFloat32 || dtype == kFloat64) && (channels == 4 || channels == 8);
}

BackwardPlan plan_backward(DType dtype, const ConvShape& s, bool need_input, bool need_weight,
                           bool winograd) {
  const TrainingConv* conv = algorithm_for(dtype, s, winograd);
  BackwardPlan plan{};
  if (need_input && has(conv, &TrainingConv::data_gradient) && has_fast_data_gradient(s)) {
    plan.data = conv;
  }
  if (need_weight && has(conv, &TrainingConv::weight_gradient)) plan.weight = conv;
  if (need_weight && !plan.weight && has_fast_terms(dtype, s)) {
    plan.weight = &training_kernels().of[dtype].few_channels;
  }
  plan.one_pass =
      need_input && need_weight && has(conv, &TrainingConv::both_gradients) && in_one_pass(s);
  if (plan.one_pass) plan.data = plan.weight = conv;
  return plan;
}

}  // namespace fr
