// The end of a residual block in training: y = activation(z * scale + shift + s), where the
// shortcut s is a map, a map by its own scale and shift (the result of a projection's convolution),
// or nothing. Without a shortcut it is also p(x), the input of a convolution that has none of our
// prologues.
//
// Memory-bound: z and the shortcut are read and y is written, 2 or 3 elements moved for up to 5
// flops. As bn_add_relu_kernel, with the same loads in flight, and backwards: the end of what the
// convolution has written is still in the L2 cache. The two shifts are one number, so that a thread
// keeps three per channel, as that kernel does.
//
// Occupancy designed for: three blocks of 256 threads, 80 registers or less.
#pragma once

#include "bn_walk.cuh"

namespace fr {

template <class T, int kVector>
__global__ void __launch_bounds__(kBnThreads, 3)
    block_end_kernel(const __grid_constant__ BlockEndParams p) {
  constexpr int kInFlight = 2;
  const BnWalk<kVector> walk(p.map);
  if (!walk.active()) return;
  const T* const z = static_cast<const T*>(p.z);
  const T* const shortcut = static_cast<const T*>(p.shortcut);
  T* const y = static_cast<T*>(p.y);

  float scale[kVector], shift[kVector], side[kVector];
  walk.per_channel(scale, p.scale, 1.0f);
  walk.per_channel(side, p.shortcut_shift, 0.0f);
  walk.per_channel(shift, p.shift, 0.0f);
#pragma unroll
  for (int e = 0; e < kVector; ++e) shift[e] += side[e];
  walk.per_channel(side, p.shortcut_scale, 1.0f);

  const Activate activate(p.activation);
  const int count = walk.count();
  for (int i = 0; i < count; i += kInFlight) {
    BnItem<T, kVector> items[kInFlight], added[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
        const int64_t at = walk.backwards(i + j);
        items[j].load(z + at);
        if (shortcut) added[j].load(shortcut + at);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          float v = fmaf(items[j].get(e), scale[e], shift[e]);
          if (shortcut) v = fmaf(added[j].get(e), side[e], v);
          items[j].set(e, activate(v));
        }
        items[j].store(y + walk.backwards(i + j));
      }
    }
  }
}

}  // namespace fr
