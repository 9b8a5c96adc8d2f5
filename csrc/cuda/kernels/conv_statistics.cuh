// Mean and biased variance of each channel from a convolution's slabs, the statistics that each
// warp has written for its rows (see conv_bn_add_relu.cuh).
//
// A block processes 32 adjacent channels, so that the loads of a warp are coalesced, with 16
// threads each, which take every 16th slab; the order of the merges is fixed.
//
// Bytes: 8 per slab and channel, 1/8 (float32) to 1/16 of the bytes of y. Occupancy designed for:
// two blocks of 512 threads, 64 registers or less, 6 KiB of shared memory.
#pragma once

#include "../device.cuh"
#include "moments.cuh"

namespace fr {

constexpr int kStatisticsLanes = 32;
constexpr int kStatisticsWays = 16;

struct ConvStatisticsParams {
  const float* slabs;  // [count][2][k]: mean, sum of squared differences
  float* mean;
  float* var;
  int count, slab_rows, rows, k;
};

__global__ void __launch_bounds__(kStatisticsLanes* kStatisticsWays, 2)
    conv_statistics_kernel(const __grid_constant__ ConvStatisticsParams p) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  Moments<1>* const parts = arena.take<Moments<1>>(kStatisticsLanes * kStatisticsWays);
  const int lane = threadIdx.x, way = threadIdx.y;
  const int channel = blockIdx.x * kStatisticsLanes + lane;

  Moments<1> moments;
  if (channel < p.k) {
    for (int i = way; i < p.count; i += kStatisticsWays) {
      const int64_t at = static_cast<int64_t>(i) * 2 * p.k + channel;
      const int64_t left = p.rows - static_cast<int64_t>(i) * p.slab_rows;
      const float size =
          static_cast<float>(left < p.slab_rows ? (left < 0 ? 0 : left) : p.slab_rows);
      moments.merge({size, {{p.slabs[at], p.slabs[at + p.k]}}});
    }
  }
  parts[way * kStatisticsLanes + lane] = moments;
  __syncthreads();
  if (way != 0 || channel >= p.k) return;
  for (int w = 1; w < kStatisticsWays; ++w) moments.merge(parts[w * kStatisticsLanes + lane]);
  p.mean[channel] = moments.of[0].mean;
  p.var[channel] = moments.seen > 0.0f ? moments.of[0].m2 / moments.seen : 0.0f;
}

}  // namespace fr
