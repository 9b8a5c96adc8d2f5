// A thread's sums for its channels, and how the threads of a block merge theirs, always in the same
// order.
#pragma once

#include "../device.cuh"
#include "bn_params.cuh"
#include "moments.cuh"

namespace fr {

// A compensated sum (Knuth's two-sum): the terms of a gradient mostly cancel, their rounding errors
// do not.
struct alignas(8) BnSum {
  float high = 0.0f, low = 0.0f;

  FR_DEVICE void add(float v) {
    const float sum = high + v, added = sum - high;
    low += (high - (sum - added)) + (v - added);
    high = sum;
  }

  FR_DEVICE void add_product(float a, float b) {
    const float product = a * b;
    low += fmaf(a, b, -product);
    add(product);
  }

  FR_DEVICE void merge(const BnSum& other) {
    add(other.high);
    low += other.low;
  }

  // The compensation of an infinite sum is NaN; ignore it.
  FR_DEVICE double value() const { return low == low ? double{high} + low : high; }
};

template <int kCount>
struct BnSums {
  BnSum dz[kCount], dz_xc[kCount];

  FR_DEVICE void merge(const BnSums& other) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      dz[e].merge(other.dz[e]);
      dz_xc[e].merge(other.dz_xc[e]);
    }
  }

  FR_DEVICE void join() {
#pragma unroll
    for (int e = 1; e < kCount; ++e) {
      dz[0].merge(dz[e]);
      dz_xc[0].merge(dz_xc[e]);
    }
  }
};

// Merges the parts of a block's rows, whose threads are `lanes` apart, into row 0. Each step merges
// the upper half of the rows into the lower half. `shared` holds one part per thread.
template <class Part>
FR_DEVICE void bn_merge_rows(Part& mine, Part* shared, int lanes, int row) {
  for (int half = kBnThreads / lanes / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) shared[threadIdx.x] = mine;
    __syncthreads();
    if (row < half) mine.merge(shared[threadIdx.x + half * lanes]);
  }
}

// Finishing kernels: a block processes eight adjacent channels, so that a warp reads whole sectors,
// with kBnFinishWays threads each, which take every 32nd slab.
constexpr int kBnFinishChannels = 8;
constexpr int kBnFinishWays = kBnThreads / kBnFinishChannels;

// Returns to every thread the sum of `v` over the threads of its channel. `shared` holds one value
// per thread of the block.
FR_DEVICE double bn_sum_ways(double v, double* shared) {
  const int way = threadIdx.x / kBnFinishChannels;
  __syncthreads();
  shared[threadIdx.x] = v;
  for (int half = kBnFinishWays / 2; half > 0; half /= 2) {
    __syncthreads();
    if (way < half) shared[threadIdx.x] += shared[threadIdx.x + half * kBnFinishChannels];
  }
  __syncthreads();
  return shared[threadIdx.x % kBnFinishChannels];
}

}  // namespace fr
