// Batch norm, residual and activation: y = activation((x - mean) * scale + bias [+ residual]).
//
// Memory-bound. Inference reads x (and the residual) and writes y: 2 or 3 elements moved for 4
// flops. Training reads x once more for its statistics. On an H100 (3.35 TB/s, about 700 ns memory
// latency) 2.3 MB must be in flight, 18 KB per multiprocessor; on an A100 12 KB. Three blocks of
// 256 threads, each thread with two items of 16 bytes per stream (apply) or four (statistics) in
// flight, make 24 to 48 KB, which is enough even while some warps wait for arithmetic. A grid is at
// most one wave of such blocks, with slabs of equal length, so no last wave leaves multiprocessors
// idle, and a thread loads its per-channel numbers once.
//
// Statistics are deterministic and come in two stages. Each thread follows Welford's update for its
// channels and the threads of a block merge theirs; then a finishing kernel merges the slabs in
// float64. Differences are taken from a pivot, the channel's first value: they are as small as the
// deviation whatever the mean, so float32 is exact enough for them.
//
// The apply kernel traverses a slab backwards, since the end of what the statistics have read is
// still in the L2 cache.
//
// Occupancy designed for: three blocks, 80 registers or less; statistics with 17 KiB of shared
// memory.
#pragma once

#include "bn_merge.cuh"
#include "bn_walk.cuh"

namespace fr {

template <class T, int kVector>
__global__ void __launch_bounds__(kBnThreads, 3)
    bn_statistics_kernel(const __grid_constant__ BnStatisticsParams p) {
  constexpr int kInFlight = 4;
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  Moments<kVector>* const parts = arena.take<Moments<kVector>>(kBnThreads);
  const BnWalk<kVector> walk(p.map);
  const T* const x = static_cast<const T*>(p.x);

  float pivot[kVector];
  Moments<kVector> moments;
  if (walk.active()) {
    BnItem<T, kVector> first;
    first.load(x + walk.offset(0));
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      pivot[e] = first.get(e);
      if (!walk.channels_last()) pivot[e] = pivot[0];
    }
    const int count = walk.count();
    for (int i = 0; i < count; i += kInFlight) {
      BnItem<T, kVector> items[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (i + j < count) items[j].load(x + walk.forwards(i + j));
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (i + j < count) {
          float v[kVector];
#pragma unroll
          for (int e = 0; e < kVector; ++e) v[e] = items[j].get(e) - pivot[e];
          moments.add(v);
        }
      }
    }
  }
  bn_merge_rows(moments, parts, p.map.lanes, walk.row());
  if (walk.row() != 0 || !walk.active()) return;
  if (!walk.channels_last()) moments.join();
  float* const partial = p.partials + static_cast<int64_t>(blockIdx.y) * 2 * p.map.channels;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e > 0 && !walk.channels_last()) break;
    const int c = walk.channel() + e;
    partial[c] = moments.of[e].mean;
    partial[p.map.channels + c] = moments.of[e].m2;
    if (blockIdx.y == 0) p.pivot[c] = pivot[e];
  }
}

__global__ void __launch_bounds__(kBnThreads)
    bn_statistics_finish_kernel(const __grid_constant__ BnStatisticsFinishParams p) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  double* const exchange = arena.take<double>(kBnThreads);
  const int c = blockIdx.x * kBnFinishChannels + threadIdx.x % kBnFinishChannels;
  const int way = threadIdx.x / kBnFinishChannels;
  const double last = p.values - p.slab_values * (p.slabs - 1);
  const auto values = [&](int slab) { return slab == p.slabs - 1 ? last : p.slab_values; };

  // Two passes over the slabs, the second with the mean, need no division per slab.
  double sum = 0.0, m2 = 0.0;
  if (c < p.channels) {
    for (int i = way; i < p.slabs; i += kBnFinishWays) {
      sum += values(i) * p.partials[static_cast<int64_t>(i) * 2 * p.channels + c];
    }
  }
  const double mean = bn_sum_ways(sum, exchange) / p.values;
  if (c < p.channels) {
    for (int i = way; i < p.slabs; i += kBnFinishWays) {
      const float* const partial = p.partials + static_cast<int64_t>(i) * 2 * p.channels + c;
      const double delta = partial[0] - mean;
      m2 += partial[p.channels] + values(i) * delta * delta;
    }
  }
  const double var = bn_sum_ways(m2, exchange) / p.values;
  if (way != 0 || c >= p.channels) return;
  const double scale = (p.weight ? p.weight[c] : 1.0) / sqrt(var + p.eps);
  const double center = p.pivot[c] + mean;
  p.mean[c] = static_cast<float>(center);
  p.var[c] = static_cast<float>(var);
  p.scale[c] = static_cast<float>(scale);
  // The shift compensates for rounding the mean to float32.
  p.shift[c] = static_cast<float>((p.bias ? p.bias[c] : 0.0) + (p.mean[c] - center) * scale);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kBnThreads, 3)
    bn_add_relu_kernel(const __grid_constant__ BnForwardParams p) {
  constexpr int kInFlight = 2;
  const BnWalk<kVector> walk(p.map);
  if (!walk.active()) return;
  const T* const x = static_cast<const T*>(p.x);
  const T* const residual = static_cast<const T*>(p.residual);
  T* const y = static_cast<T*>(p.y);

  float mean[kVector], scale[kVector], bias[kVector];
  walk.per_channel(mean, p.affine.mean, 0.0f);
  walk.per_channel(scale, p.affine.weight, 1.0f);
  walk.per_channel(bias, p.affine.bias, 0.0f);
  if (p.affine.var) {
    float var[kVector];
    walk.per_channel(var, p.affine.var, 1.0f);
#pragma unroll
    for (int e = 0; e < kVector; ++e) scale[e] /= sqrtf(var[e] + p.affine.eps);
  }

  const Activate activate(p.activation);
  const int count = walk.count();
  for (int i = 0; i < count; i += kInFlight) {
    BnItem<T, kVector> items[kInFlight], added[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
        const int64_t at = walk.backwards(i + j);
        items[j].load(x + at);
        if (residual) added[j].load(residual + at);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < count) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          float v = fmaf(items[j].get(e) - mean[e], scale[e], bias[e]);
          if (residual) v += added[j].get(e);
          items[j].set(e, activate(v));
        }
        items[j].store(y + walk.backwards(i + j));
      }
    }
  }
}

}  // namespace fr
