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
// After the first product A's stages hold exactly h, and B's a part of w2 and later the slabs of
// the epilogue. So shared memory is that of the convolution, 48 and 64 KiB, and so is the occupancy
// designed for: three blocks of 128 threads or two of 256, which hide each other's loads of w2.
#pragma once

#include "conv_epilogue.cuh"

namespace fr {

struct ResidualBlockParams {
  ConvParams first;     // of its epilogue only the affine step is used
  const void* weight2;  // [second.k][first.epilogue.k]
  ConvEpilogue second;
};

// The offset of the 16 bytes that hold pack `pack` of a row, in a row-major matrix stored as
// stages.
template <int kBytesStage>
FR_DEVICE int staged_offset(int row, int pack) {
  return pack / kChunks * kBytesStage + stage_offset(row, pack % kChunks);
}

template <class T, class Precision>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    residual_block_kernel(const __grid_constant__ ResidualBlockParams p) {
  using S = typename Precision::Storage;
  constexpr int kWidth = kPack<S>;
  constexpr int kMiddle = T::kN;
  constexpr int kParts = kMiddle * static_cast<int>(sizeof(S)) / kStageRowBytes;  // stages of h
  static_assert(sizeof(S) == 2 && kParts <= T::kStages);
  static_assert(T::kWarpsM * T::kWarpsN * kSlabBytes<T> <= T::kStages * T::kBytesB);
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  unsigned char* const shared_a = arena.take<unsigned char>(T::kStages * T::kBytesA);
  unsigned char* const shared_b = arena.take<unsigned char>(T::kStages * T::kBytesB);

  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int warp_m = warp / T::kWarpsN, warp_n = warp % T::kWarpsN;
  const int first_row = blockIdx.x * T::kM;

  typename T::Accumulators acc;
  clear<T>(acc);
  {
    constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(S));
    ImageSource<S, T::kM, T::kThreads, true, false> a(p.first, first_row, 0, 0, thread);
    FilterSource<S, T::kN, T::kThreads, true> b(static_cast<const S*>(p.first.weight), kMiddle,
                                                p.first.depth, 0, thread);
    accumulate<T, Precision>(acc, a, b, (p.first.depth + kStep - 1) / kStep, shared_a, shared_b);
  }

  const auto bring_weight2 = [&](int n) {
    FilterSource<S, T::kN, T::kThreads, true> b(
        static_cast<const S*>(p.weight2) + static_cast<int64_t>(n) * kMiddle, p.second.k - n,
        kMiddle, 0, thread);
// Not unrolled, here and below: the addresses of all parts together would spill.
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) b.bring(shared_b + part * T::kBytesB);
    cp_async_commit();
  };
  bring_weight2(0);

  // Two neighbouring columns of a fragment are four bytes of h; those of a warp's eight rows and
  // four lanes are in 32 different banks.
#pragma unroll
  for (int j = 0; j < T::kCols8; ++j) {
    const int pack = warp_n * T::kCols8 + j;
    const int col = 8 * pack + Precision::column(0, lane);
    const ChannelAffine<2> affine(p.first.epilogue.affine, col, kMiddle);
#pragma unroll
    for (int i = 0; i < T::kRows16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m * T::kWarpM + 16 * i + 8 * half + (lane >> 2);
        S pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = acc[i][j][2 * half + e];
          pair[e] = from_float<S>(
              activate(p.second.activation, fmaf(sum, affine.scale[e], affine.shift[e])));
        }
        S* const to = reinterpret_cast<S*>(shared_a + staged_offset<T::kBytesA>(row, pack)) +
                      Precision::column(0, lane);
        to[0] = pair[0];
        to[1] = pair[1];
      }
    }
  }

  ConvEpilogue second = p.second;
  second.vector = true;  // a constant, so that the compiler removes the other branches
  second.residual_scale = nullptr;
  float* const slab = reinterpret_cast<float*>(shared_b + warp * kSlabBytes<T>);
  const int warp_a = warp_m * T::kWarpM * kStageRowBytes;
  const int warp_b = warp_n * T::kWarpN * kStageRowBytes;
  for (int n = 0; n < p.second.k; n += T::kN) {
    cp_async_wait<0>();
    __syncthreads();
    clear<T>(acc);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      Precision::multiply(acc, shared_a + part * T::kBytesA + warp_a,
                          shared_b + part * T::kBytesB + warp_b, lane);
    }
    __syncthreads();  // the slabs reuse the memory of w2
    const int row0 = first_row + warp_m * T::kWarpM;
    const int channel = n + warp_n * T::kWarpN + lane % (T::kWarpN / kWidth) * kWidth;
    const ChannelAffine<kWidth> affine(p.second.affine, channel, p.second.k);
    for_each_pack<T, Precision>(acc, slab, [&](float (&v)[kWidth], int row, int) {
      if (row0 + row >= p.first.rows || channel >= p.second.k) return;
      finish_pack<S>(second, affine, v, row0 + row, channel, p.second.k);
    });
    __syncthreads();
    if (n + T::kN < p.second.k) bring_weight2(n + T::kN);
  }
}

}  // namespace fr
