// The activations on vectors and on single numbers, and their gradients. NaN passes, as in PyTorch.
#pragma once

#include "../../activation.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

template <class V>
FR_INLINE V floor_vector(V floor, V v) {
  return floor > v ? floor : v;
}

// ReLU and none without a branch: max(floor, v), where the floor is 0 for ReLU and minus infinity
// for none. The convolutions' kernels have only these two; after them, `activate` applies the
// others to a result that is still in the cache.
template <class A>
FR_INLINE Vec<A> activation_floor(Activation activation) {
  return broadcast<A>(activation == Activation::kReLU ? A(0) : -__builtin_huge_val());
}

// An activation as an object, for loops that are bound by the memory.
template <class A>
struct Floored {
  Vec<A> floor;
  FR_INLINE Vec<A> operator()(Vec<A> v) const { return floor_vector(floor, v); }
  FR_INLINE A operator()(A v) const { return floor_vector(A{floor[0]}, v); }
};

template <class A>
struct Leaky {
  FR_INLINE Vec<A> operator()(Vec<A> v) const { return v < 0 ? v * A(kLeakySlope) : v; }
  FR_INLINE A operator()(A v) const { return v < 0 ? v * A(kLeakySlope) : v; }
};

// Calls `run` with the activation.
template <class A, class Run>
FR_INLINE void with_activation(Activation activation, Run run) {
  if (activation == Activation::kLeakyReLU) return run(Leaky<A>{});
  run(Floored<A>{activation_floor<A>(activation)});
}

// Gradients, by the sign of the activation's argument, or of its result, which is the same: that of
// ReLU where the bound is 0, and of none where it is NaN, as nothing is below that.
template <class A>
struct FlooredGradient {
  A bound;
  FR_INLINE Vec<A> operator()(Vec<A> g, Vec<A> at) const { return at <= bound ? Vec<A>{} : g; }
  FR_INLINE A operator()(A g, A at) const { return at <= bound ? A(0) : g; }
};

template <class A>
struct LeakyGradient {
  FR_INLINE Vec<A> operator()(Vec<A> g, Vec<A> at) const { return at > 0 ? g : g * A(kLeakySlope); }
  FR_INLINE A operator()(A g, A at) const { return at > 0 ? g : g * A(kLeakySlope); }
};

// Calls `run` with the gradient.
template <class A, class Run>
FR_INLINE void with_gradient(Activation activation, Run run) {
  if (activation == Activation::kLeakyReLU) return run(LeakyGradient<A>{});
  run(FlooredGradient<A>{activation == Activation::kReLU ? A(0) : A(__builtin_nan(""))});
}

// Elements [begin, end) of y, in place.
template <class T>
void activate(Activation activation, void* y, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  T* p = static_cast<T*>(y);
  with_activation<A>(activation, [&](auto activated) {
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) store(activated(load(p + i)), p + i);
    for (; i < end; ++i) from_acc(activated(to_acc(p[i])), p + i);
  });
}

}  // namespace FR_ISA
}  // namespace fr
