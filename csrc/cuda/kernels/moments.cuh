// Mean and variance, accumulated number by number or merged from parts, always in the same order.
#pragma once

#include "../device.cuh"

namespace fr {

// The mean of some numbers and the sum of their squared differences from it. Unlike a difference of
// two sums, neither loses digits when the mean is large.
struct Moment {
  float mean = 0.0f, m2 = 0.0f;

  // Welford's update; `share` is one over how many numbers there are now.
  FR_DEVICE void add(float v, float share) {
    const float delta = v - mean;
    mean = fmaf(delta, share, mean);
    m2 = fmaf(delta, v - mean, m2);
  }

  // Chan, Golub and LeVeque's, for the moment of `seen` numbers and that of `other_seen` more.
  FR_DEVICE void merge(float seen, const Moment& other, float other_seen) {
    if (other_seen == 0.0f) return;
    const float delta = other.mean - mean, share = other_seen / (seen + other_seen);
    mean = fmaf(delta, share, mean);
    m2 += fmaf(delta * delta, seen * share, other.m2);
  }
};

template <int kCount>
struct Moments {
  float seen = 0.0f;  // the same for all
  Moment of[kCount];

  FR_DEVICE void add(const float (&v)[kCount]) {
    seen += 1.0f;
    const float share = 1.0f / seen;
#pragma unroll
    for (int e = 0; e < kCount; ++e) of[e].add(v[e], share);
  }

  FR_DEVICE void merge(const Moments& other) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) of[e].merge(seen, other.of[e], other.seen);
    seen += other.seen;
  }

  // With the lane whose number differs in the bits of `lanes`.
  FR_DEVICE void merge_lane(int lanes) {
    Moments other;
    other.seen = __shfl_xor_sync(0xffffffffu, seen, lanes);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      other.of[e].mean = __shfl_xor_sync(0xffffffffu, of[e].mean, lanes);
      other.of[e].m2 = __shfl_xor_sync(0xffffffffu, of[e].m2, lanes);
    }
    merge(other);
  }

  // Merges all moments into the first one.
  FR_DEVICE void join() {
#pragma unroll
    for (int e = 1; e < kCount; ++e) of[0].merge(static_cast<float>(e) * seen, of[e], seen);
  }
};

}  // namespace fr
