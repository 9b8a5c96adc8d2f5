// Mean and biased variance of each channel from a convolution's slabs, the statistics that each
// warp has written for its rows (see conv_bn_add_relu.cuh).
//
// A block merges consecutive slabs of 32 adjacent channels, so that the loads of a warp are
// coalesced, with 16 threads each, which take every 16th slab; the order of the merges is fixed.
// Many slabs take two launches: the blocks of the first write one slab each, and the second merges
// those. In one launch two blocks would read all 100,000 slabs of a stem's 64 channels at batch
// 256, while the other multiprocessors wait.
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
  float* merged;       // [gridDim.y][2][k], likewise; null: the result, by one block per channel
  float* mean;
  float* var;
  int count;          // all slabs
  int span;           // those of a block; fewer for the last
  int64_t slab_rows;  // rows of a slab; fewer for the last
  int rows, k;
};

__global__ void __launch_bounds__(kStatisticsLanes* kStatisticsWays, 2)
    conv_statistics_kernel(const __grid_constant__ ConvStatisticsParams p) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  Moments<1>* const parts = arena.take<Moments<1>>(kStatisticsLanes * kStatisticsWays);
  const int lane = threadIdx.x, way = threadIdx.y;
  const int channel = blockIdx.x * kStatisticsLanes + lane;

  const int begin = blockIdx.y * p.span;
  const int end = p.count - begin < p.span ? p.count : begin + p.span;

  Moments<1> moments;
  if (channel < p.k) {
    for (int i = begin + way; i < end; i += kStatisticsWays) {
      const int64_t at = static_cast<int64_t>(i) * 2 * p.k + channel;
      const int64_t left = p.rows - i * p.slab_rows;
      const float size =
          static_cast<float>(left < p.slab_rows ? (left < 0 ? 0 : left) : p.slab_rows);
      moments.merge({size, {{p.slabs[at], p.slabs[at + p.k]}}});
    }
  }
  parts[way * kStatisticsLanes + lane] = moments;
  __syncthreads();
  if (way != 0 || channel >= p.k) return;
  for (int w = 1; w < kStatisticsWays; ++w) moments.merge(parts[w * kStatisticsLanes + lane]);
  if (p.merged) {
    const int64_t at = static_cast<int64_t>(blockIdx.y) * 2 * p.k + channel;
    p.merged[at] = moments.of[0].mean;
    p.merged[at + p.k] = moments.of[0].m2;
  } else {
    p.mean[channel] = moments.of[0].mean;
    p.var[channel] = moments.seen > 0.0f ? moments.of[0].m2 / moments.seen : 0.0f;
  }
}

}  // namespace fr
