// A block's tile of the matrix product C = A B^T, and its pipeline of loads.
#pragma once

#include "conv_source.cuh"

namespace fr {

// kM x kN results by kWarpsM x kWarpsN warps, with kStages stages of 64 bytes of depth each, A's
// rows followed by B's. kBlocks is the intended number of blocks per multiprocessor.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kRows16 = kWarpM / 16, kCols8 = kWarpN / 8;
  static constexpr int kBytesA = kM * kStageRowBytes, kBytesB = kN * kStageRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB, kRingBytes = kStages * kStageBytes;
  // The ring of stages, and scale and shift of each column.
  static constexpr int kSharedBytes = kRingBytes + kN * static_cast<int>(sizeof(float2));

  using Accumulators = float[kRows16][kCols8][4];
};

// Where a thread's warp is in its block's tile.
template <class T>
struct WarpPlace {
  int lane, warp, m, n;

  FR_DEVICE explicit WarpPlace(int thread)
      : lane(thread & 31), warp(thread >> 5), m(warp / T::kWarpsN), n(warp % T::kWarpsN) {}

  // The warp's rows of A and of B in a stage.
  FR_DEVICE int rows_a() const { return m * T::kWarpM * kStageRowBytes; }
  FR_DEVICE int rows_b() const { return T::kBytesA + n * T::kWarpN * kStageRowBytes; }
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

// What the pipeline fetches after its last stages: here, nothing.
struct NoTail {
  static constexpr int kParts = 0;
  template <class... Ignored>
  FR_DEVICE explicit NoTail(const Ignored&...) {}
  FR_DEVICE void bring(int, int) {}
};

// A sum over `steps` stages. The copies of kStages - 1 stages are in flight while one is
// multiplied. The single barrier of a step guarantees that its stage has arrived for all threads,
// and that all have read the stage before it, which may then be overwritten.
//
// In the last steps there is nothing left to load, and kStages - 1 stages become free. They take
// the first parts of `tail`, part q in place of what would be step `steps` + q.
template <class T, class SourceA, class SourceB, class Tail>
class Pipeline {
 public:
  FR_DEVICE Pipeline(SourceA& a, SourceB& b, Tail& tail, int steps)
      : a_(a), b_(b), tail_(tail), steps_(steps) {}

  // Starts the first copies.
  FR_DEVICE void start() {
#pragma unroll 1
    for (int s = 0; s < T::kStages - 1; ++s) bring(s, s);
  }

  // Adds the products to acc. Returns the number of the stage that is part 0 of the tail. The
  // thread may not have waited for the tail yet, and others may still read the stage before it.
  template <class Precision>
  FR_DEVICE int run(typename T::Accumulators& acc, const typename Precision::Operands& operands) {
    int read = 0;
    for (int step = 0; step < steps_; ++step) {
      cp_async_wait<T::kStages - 2>();
      __syncthreads();
      bring(step + T::kStages - 1, read == 0 ? T::kStages - 1 : read - 1);
      Precision::multiply(acc, operands, read * T::kStageBytes);
      read = read + 1 == T::kStages ? 0 : read + 1;
    }
    return read;
  }

 private:
  FR_DEVICE void bring(int step, int stage) {
    if (step < steps_) {
      a_.bring(stage * T::kStageBytes);
      b_.bring(stage * T::kStageBytes);
    } else if (Tail::kParts > 0 && step - steps_ < Tail::kParts) {
      tail_.bring(step - steps_, stage * T::kStageBytes);
    }
    // Commit empty groups too, so that the wait above always refers to the same one.
    cp_async_commit();
  }

  SourceA& a_;
  SourceB& b_;
  Tail& tail_;
  int steps_;
};

}  // namespace fr
