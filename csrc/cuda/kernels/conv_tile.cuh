// A block's tile of the matrix product C = A B^T, and its pipeline of loads.
#pragma once

#include "conv_source.cuh"

namespace fr {

// kM x kN results by kWarpsM x kWarpsN warps, with kStages stages of 64 bytes of depth each.
// kBlocks is the intended number of blocks per multiprocessor.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kRows16 = kWarpM / 16, kCols8 = kWarpN / 8;
  static constexpr int kBytesA = kM * kStageRowBytes, kBytesB = kN * kStageRowBytes;
  static constexpr int kSharedBytes = kStages * (kBytesA + kBytesB);

  using Accumulators = float[kRows16][kCols8][4];
};

template <class T>
FR_DEVICE void clear(typename T::Accumulators& acc) {
#pragma unroll
  for (int i = 0; i < T::kRows16; ++i) {
#pragma unroll
    for (int j = 0; j < T::kCols8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
    }
  }
}

// Adds `steps` stages to acc. The copies of kStages - 1 stages are in flight while one is
// multiplied. The single barrier of a step guarantees that its stage has arrived for all threads,
// and that all have read the stage before it, which may then be overwritten. On return all shared
// memory is free for another use.
template <class T, class Precision, class SourceA, class SourceB>
FR_DEVICE void accumulate(typename T::Accumulators& acc, SourceA& a, SourceB& b, int steps,
                          unsigned char* shared_a, unsigned char* shared_b) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_a = warp / T::kWarpsN * T::kWarpM * kStageRowBytes;
  const int warp_b = warp % T::kWarpsN * T::kWarpN * kStageRowBytes;
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) {
      a.bring(shared_a + s * T::kBytesA);
      b.bring(shared_b + s * T::kBytesB);
    }
    cp_async_commit();
  }
  int read = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();
    if (step + T::kStages - 1 < steps) {
      const int write = read == 0 ? T::kStages - 1 : read - 1;
      a.bring(shared_a + write * T::kBytesA);
      b.bring(shared_b + write * T::kBytesB);
    }
    // Commit empty groups too, so that the wait above always refers to the same one.
    cp_async_commit();
    Precision::multiply(acc, shared_a + read * T::kBytesA + warp_a,
                        shared_b + read * T::kBytesB + warp_b, lane);
    read = read + 1 == T::kStages ? 0 : read + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace fr
