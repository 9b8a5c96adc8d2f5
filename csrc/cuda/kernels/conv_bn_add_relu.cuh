// y = activation(bn(conv(x, w)) + residual), all of it in one kernel.
//
//   y[m][n] = activation(scale[n] sum_k a[m][k] w[n][k] + shift[n] + r[m][n])
//
// with m a pixel of y, n an output channel, k = (ky, kx, c) and a[m][k] the pixel of x under tap
// (ky, kx): an implicit matrix product. Both operands, NHWC maps and KRSC filters, have k as their
// innermost dimension, which is the layout of mma.sync; a is never stored.
//
// Bytes: x, w, residual and y once each, if L2 holds the rows that neighbouring blocks share.
// Flops: 2 m n k. In bfloat16 on an H100 that is memory-bound below 300 flops a byte: every 1x1
// with a residual, all of ResNet's stage 1 and most of stage 2.
//
// Tiles: 128 x 128 does 64 flops per byte loaded into shared memory, so that tensor cores and not
// L2 are the limit; 128 x 64 is for 64 output channels; 64 x 64 fills the multiprocessors when the
// map is small. A warp computes 64 x 32 (or 32 x 32): six (or four) ldmatrix for sixteen (or eight)
// mma. Blocks that share rows of x are neighbours in the grid.
//
// Where even 64 x 64 tiles are too few, blockIdx.y splits the depth: the sums of each part are
// stored in float32, and conv_split_finish_kernel adds them in order. No atomics: the same bits
// every time.
//
// Occupancy designed for: two blocks of 256 threads, three of 128, or four of 128 per
// multiprocessor, and in strict float32 one, two or four, as Tile::kBlocks tells the compiler;
// shared memory of 64, 48 and 24 KiB per block, the last with one stage less, so that the 100 KiB
// of sm_86, sm_89 and sm_120 hold 1, 2 and 3 or 4.
#pragma once

#include "conv_epilogue.cuh"
#include "moments.cuh"

namespace fr {

template <class T, class Precision, bool kVector, bool kSecond>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_bn_add_relu_kernel(const __grid_constant__ ConvParams p) {
  using S = typename Precision::Storage;
  constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(S));
  constexpr int kWidth = kPack<S>;
  static_assert(T::kWarpsM * T::kWarpsN * kSlabBytes<T> <= T::kStages * T::kBytesA,
                "the slabs reuse the memory of A's stages");
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  unsigned char* const shared_a = arena.take<unsigned char>(T::kStages * T::kBytesA);
  unsigned char* const shared_b = arena.take<unsigned char>(T::kStages * T::kBytesB);

  const int thread = threadIdx.x, warp = thread >> 5;
  const int tile_n = blockIdx.x % p.tiles_n, tile_m = blockIdx.x / p.tiles_n;
  const int split = blockIdx.y, group = blockIdx.z;
  const int first_row = tile_m * T::kM, first_col = tile_n * T::kN;  // col: within the group
  const int all_steps = (p.depth + kStep - 1) / kStep;
  const int step0 = split * p.steps_per_split;
  const int steps = min(all_steps - step0, p.steps_per_split);

  typename T::Accumulators acc;
  clear<T>(acc);
  {
    const int filter = group * p.group_k + first_col;
    ImageSource<S, T::kM, T::kThreads, kVector, kSecond> a(p, first_row, group * p.group_c,
                                                           step0 * kStep, thread);
    FilterSource<S, T::kN, T::kThreads, kVector> b(
        static_cast<const S*>(p.weight) + static_cast<int64_t>(filter) * p.depth,
        p.group_k - first_col, p.depth, step0 * kStep, thread);
    accumulate<T, Precision>(acc, a, b, steps, shared_a, shared_b);
  }

  const int warp_m = warp / T::kWarpsN, warp_n = warp % T::kWarpsN, lane = thread & 31;
  const int row0 = first_row + warp_m * T::kWarpM;
  const int channel =
      group * p.group_k + first_col + warp_n * T::kWarpN + lane % (T::kWarpN / kWidth) * kWidth;
  const int end = (group + 1) * p.group_k;
  float* const slab = reinterpret_cast<float*>(shared_a + warp * kSlabBytes<T>);

  if (p.partial) {
    for_each_pack<T, Precision>(acc, slab, [&](float (&v)[kWidth], int row, int) {
      if (row0 + row >= p.rows) return;
      const int64_t at =
          (static_cast<int64_t>(split) * p.rows + row0 + row) * p.epilogue.k + channel;
      if (p.epilogue.vector) {
        if (channel >= end) return;
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
          *reinterpret_cast<float4*>(p.partial + at + i) =
              make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
      } else {
        for (int i = 0; i < kWidth; ++i) {
          if (channel + i < end) p.partial[at + i] = v[i];
        }
      }
    });
    return;
  }

  const ChannelAffine<kWidth> affine(p.epilogue.affine, channel, end);
  Moments<kWidth> statistics;
  for_each_pack<T, Precision>(acc, slab, [&](float (&v)[kWidth], int row, int) {
    if (row0 + row >= p.rows || channel >= end) return;
    finish_pack<S>(p.epilogue, affine, v, row0 + row, channel, end);
    if (p.statistics) statistics.add(v);
  });
  if (p.statistics) {
    // Lanes of equal pack merge over their rows; a slab of the result is a warp's rows.
    for (int lanes = T::kWarpN / kWidth; lanes < 32; lanes *= 2) statistics.merge_lane(lanes);
    if (lane < T::kWarpN / kWidth) {
      const int64_t at =
          static_cast<int64_t>(tile_m * T::kWarpsM + warp_m) * 2 * p.epilogue.k + channel;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (channel + i < end) {
          p.statistics[at + i] = statistics.of[i].mean;
          p.statistics[at + p.epilogue.k + i] = statistics.of[i].m2;
        }
      }
    }
  }
}

// Adds the parts of a split sum, in order, and finishes. A thread has one pack of channels.
constexpr int kFinishThreads = 256;

template <class S>
__global__ void __launch_bounds__(kFinishThreads)
    conv_split_finish_kernel(const __grid_constant__ ConvParams p, int splits) {
  constexpr int kWidth = kPack<S>;
  const int packs = (p.epilogue.k + kWidth - 1) / kWidth;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.rows) * packs) return;
  const int row = static_cast<int>(index / packs),
            channel = static_cast<int>(index % packs) * kWidth;
  float sum[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = 0.0f;
  for (int split = 0; split < splits; ++split) {
    const int64_t at = (static_cast<int64_t>(split) * p.rows + row) * p.epilogue.k + channel;
    if (p.epilogue.vector) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(p.partial + at + i);
        sum[i] += four.x;
        sum[i + 1] += four.y;
        sum[i + 2] += four.z;
        sum[i + 3] += four.w;
      }
    } else {
      for (int i = 0; i < kWidth; ++i) {
        if (channel + i < p.epilogue.k) sum[i] += p.partial[at + i];
      }
    }
  }
  const ChannelAffine<kWidth> affine(p.epilogue.affine, channel, p.epilogue.k);
  finish_pack<S>(p.epilogue, affine, sum, row, channel, p.epilogue.k);
}

}  // namespace fr
