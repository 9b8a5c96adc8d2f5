// The activations that follow a sum, for hosts and kernels of all devices. The numbers are those of
// fused_resnet/backends/activation.py; CONTRIBUTING says what adding one takes.
#pragma once

#include <cstdint>

namespace fr {

enum class Activation : int32_t { kNone, kReLU, kLeakyReLU };
constexpr int64_t kNumActivations = 3;

// Of LeakyReLU, for negative numbers: PyTorch's default.
constexpr double kLeakySlope = 0.01;

}  // namespace fr
