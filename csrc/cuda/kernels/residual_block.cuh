// The end of a bottleneck in one kernel, with the result of its 3x3 kept on chip:
//
//   h[m][j] = act(scale1[j] sum_k a[m][k] w1[j][k] + shift1[j])        j < 64 or 128
//   y[m][n] = act(scale2[n] sum_j h[m][j] w2[n][j] + shift2[n] + r[m][n])
//
// A block computes h for its 128 pixels and all middle channels, as one tile of an ordinary
// convolution; rounds it to the storage type, as if it were stored; writes it to shared memory in
// the layout of the pipeline's stages; and multiplies it by w2, as many output channels at a time
// as there are middle channels.
//
// Bytes: x, r and y once. h, which separate kernels would write and read, is a fifth of their bytes
// in ResNet's stage 1. Flops as in separate kernels: 2 m (j k + n j). w2 (32 or 128 KiB) stays in
// L2.
//
// After the first product the parts of A in the ring's first stages hold exactly h, and the parts
// of B a part of w2. With 64 middle channels h takes two stages, and the residual is copied to the
// other two stages' A together with w2; with 128 there is no room for it before w2 has been
// multiplied, and it takes w2's place. So shared memory is that of the convolution, 48.5 and 65
// KiB, and so is the occupancy designed for: three blocks of 128 threads or two of 256, which hide
// each other's loads.
#pragma once

#include <type_traits>

#include "conv_epilogue.cuh"

namespace fr {

struct ResidualBlockParams {
  ConvParams first;     // of its epilogue only the affine step is used
  const void* weight2;  // [second.k][first.epilogue.k]
  ConvEpilogue second;
};

template <class T, class Precision>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    residual_block_kernel(const __grid_constant__ ResidualBlockParams p) {
  using S = typename Precision::Storage;
  constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(S));
  constexpr int kMiddle = T::kN;
  constexpr int kParts = kMiddle / kStep;  // stages of h
  // Whether the residual has a place of its own.
  constexpr bool kOwnPlace =
      (T::kStages - kParts) * T::kBytesA >= T::kM * T::kN * static_cast<int>(sizeof(S));
  using Staged = std::conditional_t<kOwnPlace, StagedTile<T, S, 0, T::kBytesA>,
                                    StagedTile<T, S, T::kBytesA, T::kBytesB>>;
  constexpr int kFirstStage = kOwnPlace ? kParts : 0;
  static_assert(sizeof(S) == 2 && kParts <= T::kStages);
  static_assert(kFirstStage + Staged::kParts <= T::kStages);
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  unsigned char* const ring = arena.take<unsigned char>(T::kRingBytes);
  float2* const affine = arena.take<float2>(T::kN);

  const int thread = threadIdx.x;
  const WarpPlace<T> at(thread);
  const int lane = at.lane, first_row = blockIdx.x * T::kM;
  const typename Precision::Operands operands(ring + at.rows_a(), ring + at.rows_b(), lane);
  const Activate activate(p.second.activation);

  typename T::Accumulators acc;
  clear<T>(acc);
  const SharedAddress to = first_chunk(ring, thread);
  {
    ImageSource<S, T::kM, T::kThreads, true, false> a(p.first, first_row, 0, 0, to, thread);
    FilterSource<S, T::kN, T::kThreads, true> b(static_cast<const S*>(p.first.weight), kMiddle,
                                                p.first.depth, 0, to + T::kBytesA, thread);
    NoTail nothing;
    Pipeline<T, decltype(a), decltype(b), NoTail> pipeline(a, b, nothing,
                                                           (p.first.depth + kStep - 1) / kStep);
    pipeline.start();
    fill_affine<T>(affine, p.first.epilogue.affine, 0, kMiddle);
    pipeline.template run<Precision>(acc, operands);
  }
  cp_async_wait<0>();
  __syncthreads();

  const int row0 = first_row + at.m * T::kWarpM;
  const auto bring_residual = [&](int n) {
    ResidualSource<T, Staged> residual(ring, p.second, first_row, n, p.first.rows, p.second.k);
// Not unrolled, here and below: the addresses of all parts together would spill.
#pragma unroll 1
    for (int part = 0; part < Staged::kParts; ++part) {
      residual.bring(part, (kFirstStage + part) * T::kStageBytes);
    }
    cp_async_commit();
  };
  const auto bring_weight2 = [&](int n) {
    FilterSource<S, T::kN, T::kThreads, true> b(
        static_cast<const S*>(p.weight2) + static_cast<int64_t>(n) * kMiddle, p.second.k - n,
        kMiddle, 0, to + T::kBytesA, thread);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) b.bring(part * T::kStageBytes);
    cp_async_commit();
    if (kOwnPlace) bring_residual(n);
  };
  bring_weight2(0);

  // Two neighbouring columns of a fragment are four bytes of h; those of a warp's eight rows and
  // four lanes are in 32 different banks.
#pragma unroll
  for (int j = 0; j < T::kCols8; ++j) {
    const int pack = at.n * T::kCols8 + j;
    const int col = 8 * pack + Precision::column(0, lane);
    const float2 by[2] = {affine[col], affine[col + 1]};
#pragma unroll
    for (int b = 0; b < 2 * T::kRows16; ++b) {
      const int row = at.m * T::kWarpM + 8 * b + (lane >> 2);
      Pair<S> pair;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = acc[b / 2][j][b % 2 * 2 + e];
        pair.values[e] = from_float<S>(activate(fmaf(sum, by[e].x, by[e].y)));
      }
      unsigned char* const chunk =
          ring + pack / kChunks * T::kStageBytes + stage_offset(row, pack % kChunks);
      *reinterpret_cast<Pair<S>*>(chunk + 4 * (lane & 3)) = pair;
    }
  }

  for (int n = 0; n < p.second.k; n += T::kN) {
    cp_async_wait<0>();
    __syncthreads();
    fill_affine<T>(affine, p.second.affine, n, p.second.k);
    clear<T>(acc);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      Precision::multiply(acc, operands, part * T::kStageBytes);
    }
    __syncthreads();  // the residual reuses the memory of w2, and scale and shift are there
    if (!kOwnPlace) {
      bring_residual(n);
      cp_async_wait<0>();
      __syncwarp();
    }
    Moments<2 * T::kCols8> none;
    finish_packs<Epilogue::kResidual, Precision, T>(
        acc, Staged(ring, kFirstStage, at.warp), lane, affine + at.n * T::kWarpN, activate,
        WarpMap<S>(static_cast<S*>(p.second.y), p.second.k, row0, n + at.n * T::kWarpN,
                   p.first.rows, p.second.k),
        none);
    // The next copies go to memory that no warp reads any more, or to where this warp's own
    // residual was.
    static_assert(kOwnPlace || Staged::kRowBytes == kStageRowBytes);
    __syncwarp();
    if (n + T::kN < p.second.k) bring_weight2(n + T::kN);
  }
}

}  // namespace fr
