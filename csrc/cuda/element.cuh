// The storage types of feature maps and their conversions to and from float32, for single elements
// and for packs of 16 bytes, the widest access of one memory instruction.
#pragma once

#include "../activation.h"
#include "device.cuh"

namespace fr {

template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

FR_DEVICE float to_float(float v) { return v; }
FR_DEVICE float to_float(__half v) { return __half2float(v); }
FR_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest, ties to even.
template <class T>
FR_DEVICE T from_float(float v);
template <>
FR_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
FR_DEVICE __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
FR_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
union Pack {
  uint4 bits;
  T values[kPack<T>];
  FR_DEVICE Pack() : bits{} {}
};

// Both require an address that is a multiple of 16.
template <class T>
FR_DEVICE void load_pack(float (&values)[kPack<T>], const T* from) {
  Pack<T> pack;
  pack.bits = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) values[i] = to_float(pack.values[i]);
}

template <class T>
FR_DEVICE void store_pack(T* to, const float (&values)[kPack<T>]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) pack.values[i] = from_float<T>(values[i]);
  *reinterpret_cast<uint4*>(to) = pack.bits;
}

// The activations as one expression without a branch, as kernels unroll hundreds of them. NaN
// passes, as in PyTorch.
struct Activate {
  float slope, least;  // of negative numbers: the factor, and what they do not fall below

  FR_DEVICE explicit Activate(Activation a)
      : slope(a == Activation::kNone        ? 1.0f
              : a == Activation::kLeakyReLU ? static_cast<float>(kLeakySlope)
                                            : 0.0f),
        least(a == Activation::kReLU ? 0.0f : -INFINITY) {}

  // For -infinity ReLU's slope of 0 gives NaN, which fmaxf replaces by 0.
  FR_DEVICE float operator()(float v) const { return v < 0.0f ? fmaxf(v * slope, least) : v; }
};

// Two neighbouring elements, which one instruction loads or stores.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

// Whether an activation changes the gradient where its argument, or its result, is `at`; and the
// gradient there.
FR_DEVICE bool changes_gradient(Activation activation, float at) {
  if (activation == Activation::kLeakyReLU) return !(at > 0.0f);
  return at <= 0.0f;
}
FR_DEVICE float changed_gradient(Activation activation, float g) {
  return activation == Activation::kLeakyReLU ? g * static_cast<float>(kLeakySlope) : 0.0f;
}

}  // namespace fr
