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
// shared memory of 65, 48.5 and 24.5 KiB per block, the last with one stage less, so that the 100
// KiB of sm_86, sm_89 and sm_120 hold 1, 2 and 3.
#pragma once

#include <type_traits>

#include "conv_epilogue.cuh"

namespace fr {

template <class T, class Precision, bool kVector, bool kSecond, Epilogue kEpilogue>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    conv_bn_add_relu_kernel(const __grid_constant__ ConvParams p) {
  using S = typename Precision::Storage;
  constexpr bool kIsPartial = kEpilogue == Epilogue::kPartial;
  using Result = std::conditional_t<kIsPartial, float, S>;
  using Staged = StagedTile<T, Result, 0, T::kStageBytes>;
  using Tail =
      std::conditional_t<kEpilogue == Epilogue::kResidual, ResidualSource<T, Staged>, NoTail>;
  constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(S));
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  unsigned char* const ring = arena.take<unsigned char>(T::kRingBytes);
  float2* const affine = arena.take<float2>(T::kN);

  const int thread = threadIdx.x;
  const WarpPlace<T> at(thread);
  const int tile_n = blockIdx.x % p.tiles_n, tile_m = blockIdx.x / p.tiles_n;
  const int split = blockIdx.y, group = blockIdx.z;
  const int first_row = tile_m * T::kM, first_col = tile_n * T::kN;  // col: within the group
  const int first_filter = group * p.group_k + first_col, end = (group + 1) * p.group_k;
  const int row0 = first_row + at.m * T::kWarpM, channel0 = first_filter + at.n * T::kWarpN;
  const int all_steps = (p.depth + kStep - 1) / kStep;
  const int step0 = split * p.steps_per_split;
  const int steps = min(all_steps - step0, p.steps_per_split);

  typename T::Accumulators acc;
  clear<T>(acc);
  Tail tail(ring, p.epilogue, first_row, first_filter, p.rows, end);
  int stage;
  {
    const SharedAddress to = first_chunk(ring, thread);
    ImageSource<S, T::kM, T::kThreads, kVector, kSecond> a(p, first_row, group * p.group_c,
                                                           step0 * kStep, to, thread);
    FilterSource<S, T::kN, T::kThreads, kVector> b(
        static_cast<const S*>(p.weight) + static_cast<int64_t>(first_filter) * p.depth,
        p.group_k - first_col, p.depth, step0 * kStep, to + T::kBytesA, thread);
    Pipeline<T, decltype(a), decltype(b), Tail> pipeline(a, b, tail, steps);
    pipeline.start();
    if (!kIsPartial) fill_affine<T>(affine, p.epilogue.affine, first_filter, end);
    const typename Precision::Operands operands(ring + at.rows_a(), ring + at.rows_b(), at.lane);
    stage = pipeline.template run<Precision>(acc, operands);
  }

  const float2* const columns = affine + at.n * T::kWarpN;
  Moments<2 * T::kCols8> statistics;
  if constexpr (kEpilogue == Epilogue::kElements) {
    finish_elements<Precision, T>(acc, p, at.lane, columns, row0, channel0, end, statistics);
  } else {
    // The tail needs more stages than have become free, so it takes the last step's too.
    if constexpr (Staged::kParts > T::kStages - 1) {
      __syncthreads();
      const int last = stage == 0 ? T::kStages - 1 : stage - 1;
      if (Tail::kParts > 0) tail.bring(T::kStages - 1, last * T::kStageBytes);
      cp_async_commit();
    }
    cp_async_wait<0>();
    __syncwarp();
    Result* const map = kIsPartial ? reinterpret_cast<Result*>(p.partial) +
                                         static_cast<int64_t>(split) * p.rows * p.epilogue.k
                                   : static_cast<Result*>(p.epilogue.y);
    finish_packs<kEpilogue, Precision, T>(
        acc, Staged(ring, stage, at.warp), at.lane, columns, Activate(p.epilogue.activation),
        WarpMap<Result>(map, p.epilogue.k, row0, channel0, p.rows, end), statistics);
  }
  // A slab of statistics is a warp's rows.
  if (kEpilogue == Epilogue::kStatistics || (kEpilogue == Epilogue::kElements && p.statistics)) {
    float* const slab =
        p.statistics + static_cast<int64_t>(tile_m * T::kWarpsM + at.m) * 2 * p.epilogue.k;
    store_statistics<Precision, T>(statistics, slab + channel0, p.epilogue.k, at.lane,
                                   p.rows - row0, end - channel0);
  }
}

// Stores y of one pixel's pack of channels, given its sums.
template <class S>
FR_DEVICE void finish_pack(const ConvEpilogue& e, const float (&sum)[kPack<S>], int row,
                           int channel) {
  const ChannelAffine<kPack<S>> affine(e.affine, channel, e.k);
  const Activate activate(e.activation);
  const int64_t at = static_cast<int64_t>(row) * e.k + channel;
  const S* residual = static_cast<const S*>(e.residual);
  float r[kPack<S>];
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) r[i] = 0.0f;
  if (residual) {
    if (e.vector) {
      load_pack(r, residual + at);
    } else {
      for (int i = 0; i < kPack<S>; ++i) {
        if (channel + i < e.k) r[i] = to_float(residual[at + i]);
      }
    }
    if (e.residual_scale) {
#pragma unroll
      for (int i = 0; i < kPack<S>; ++i) {
        if (channel + i < e.k) {
          r[i] = fmaf(r[i], e.residual_scale[channel + i], e.residual_shift[channel + i]);
        }
      }
    }
  }
  float v[kPack<S>];
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) {
    v[i] = activate(fmaf(sum[i], affine.scale[i], affine.shift[i]) + r[i]);
  }
  S* y = static_cast<S*>(e.y) + at;
  if (e.vector) {
    store_pack(y, v);
  } else {
    for (int i = 0; i < kPack<S>; ++i) {
      if (channel + i < e.k) y[i] = from_float<S>(v[i]);
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
  finish_pack<S>(p.epilogue, sum, row, channel);
}

}  // namespace fr
