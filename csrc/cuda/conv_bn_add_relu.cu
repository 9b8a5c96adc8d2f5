#include <algorithm>

#include "conv_bn_add_relu.h"
#include "conv_tiles.cuh"
#include "kernels/conv_statistics.cuh"

namespace fr {
namespace {

struct ConvTileInfo {
  int m, n, slab_rows;  // slab: the rows whose statistics come together
};

template <class T>
constexpr ConvTileInfo kInfo{T::kM, T::kN, T::kWarpM};

constexpr ConvTileInfo kTiles[kConvTiles] = {kInfo<Tiles<void>::Large>, kInfo<Tiles<void>::Tall>,
                                             kInfo<Tiles<void>::Small>};
// Assumed fraction of the peak that the inner loop of a tile reaches. It grows with the flops per
// byte loaded into shared memory.
constexpr double kEfficiency[kConvTiles] = {0.8, 0.7, 0.5};

// Slabs of statistics that a block of the finishing kernel can merge while others have none, and
// into which more are merged first: eight for each of its 16 threads of a channel.
constexpr int kMergedSlabs = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int element_bytes(ConvPrecision precision) {
  return precision == ConvPrecision::kFloat16 || precision == ConvPrecision::kBFloat16 ? 2 : 4;
}

int depth_steps(const ConvParams& p, ConvPrecision precision) {
  return static_cast<int>(ceil_div(p.depth, kStageRowBytes / element_bytes(precision)));
}

int64_t blocks(const ConvParams& p, int tile) {
  return ceil_div(p.rows, kTiles[tile].m) * ceil_div(p.group_k, kTiles[tile].n) *
         (p.epilogue.k / p.group_k);
}

int written_slabs(const ConvParams& p, const ConvPlan& plan) {
  const ConvTileInfo& tile = kTiles[plan.tile];
  return static_cast<int>(ceil_div(p.rows, tile.m) * (tile.m / tile.slab_rows));
}

// Clock cycles until the last multiprocessor finishes. The constants are round numbers for GPUs
// since 2020, of which only the ratios matter: products per cycle, bytes per cycle and
// multiprocessor, cycles to fill the pipeline and to drain it through the epilogue, and cycles of a
// second launch.
double cost(const ConvParams& p, ConvPrecision precision, const ConvPlan& plan, int processors) {
  constexpr double kProducts[] = {1024, 1024, 512, 128};
  constexpr double kBytes = 10, kFixed = 2000, kLaunch = 3000;
  const ConvTileInfo& tile = kTiles[plan.tile];
  const double depth = static_cast<double>(kStageRowBytes) / element_bytes(precision) *
                       ceil_div(depth_steps(p, precision), plan.split_k);
  const double block =
      tile.m * tile.n * depth / (kProducts[static_cast<int>(precision)] * kEfficiency[plan.tile]);
  const int64_t rounds = ceil_div(blocks(p, plan.tile) * plan.split_k, processors);
  double cycles = static_cast<double>(rounds) * (block + kFixed);
  if (plan.split_k > 1) {
    const double partial = static_cast<double>(conv_partial_numel(p, plan)) * sizeof(float);
    cycles += kLaunch + 2 * partial / (kBytes * processors);
  }
  return cycles;
}

// Whether y and the residual can be stored and loaded 16 bytes at a time.
bool finishes_by_packs(const ConvParams& p, ConvPrecision precision, bool aligned) {
  return aligned && p.group_k % (16 / element_bytes(precision)) == 0;
}

// Only the last tile can split a sum of two convolutions.
bool splits(const ConvParams& p, int tile) { return p.second.c == 0 || tile == kConvTiles - 1; }

// Combinations without an instance: with statistics neither of these two is used, and a second
// convolution takes the place of the residual.
bool is_excluded(const ConvParams& p, const ConvPlan& plan) {
  const ConvEpilogue& e = p.epilogue;
  const bool second = p.second.c > 0;
  return (p.statistics && (e.residual || e.activation != Activation::kNone || second)) ||
         (second && e.residual) || (plan.split_k > 1 && !splits(p, plan.tile));
}

Epilogue epilogue_of(const ConvParams& p, const ConvPlan& plan) {
  const ConvEpilogue& e = p.epilogue;
  if (!e.vector || e.residual_scale) return Epilogue::kElements;
  if (plan.split_k > 1) return Epilogue::kPartial;
  if (p.statistics) return Epilogue::kStatistics;
  return e.residual ? Epilogue::kResidual : Epilogue::kPacks;
}

}  // namespace

ConvParams conv_params(const ConvShape& s) {
  const auto as_int = [](int64_t v) { return static_cast<int>(v); };
  ConvParams p{};
  p.image = {nullptr,         as_int(s.h),     as_int(s.w),          as_int(s.c),
             as_int(s.kh),    as_int(s.kw),    as_int(s.stride_h),   as_int(s.stride_w),
             as_int(s.pad_h), as_int(s.pad_w), as_int(s.dilation_h), as_int(s.dilation_w)};
  p.epilogue.k = as_int(s.k);
  p.rows = as_int(s.n * s.out_h() * s.out_w());
  p.out_h = as_int(s.out_h());
  p.out_w = as_int(s.out_w());
  p.group_c = as_int(s.group_c());
  p.group_k = as_int(s.group_k());
  p.depth = as_int(s.depth());
  return p;
}

bool conv_by_packs(const ConvParams& p, ConvPrecision precision, bool aligned) {
  constexpr int kMostTaps = 64;  // bits of the word that marks the taps inside the map
  const int pack = 16 / element_bytes(precision);
  return aligned && p.group_c % pack == 0 && p.second.c % pack == 0 &&
         p.image.kh * p.image.kw <= kMostTaps;
}

int first_conv_tile(const ConvParams& p, ConvPrecision precision, bool aligned) {
  const bool all = conv_by_packs(p, precision, aligned) &&
                   finishes_by_packs(p, precision, aligned) && !p.epilogue.residual_scale;
  return all ? 0 : kConvTiles - 1;
}

ConvPlan plan_conv(const ConvParams& p, ConvPrecision precision, bool aligned, bool may_split,
                   int multiprocessors) {
  // A part with fewer steps would spend its time filling the pipeline.
  constexpr int kLeastSteps = 8, kMostSplits = 16;
  const int most = may_split ? depth_steps(p, precision) / kLeastSteps : 1;
  ConvPlan best{0, 1};
  double best_cost = -1;
  for (int tile = first_conv_tile(p, precision, aligned); tile < kConvTiles; ++tile) {
    const int most_here = splits(p, tile) ? std::min(most, kMostSplits) : 1;
    for (int parts = 1; parts == 1 || parts <= most_here; parts *= 2) {
      const double cycles = cost(p, precision, {tile, parts}, multiprocessors);
      if (best_cost < 0 || cycles < best_cost) {
        best = {tile, parts};
        best_cost = cycles;
      }
    }
  }
  return best;
}

int64_t conv_partial_numel(const ConvParams& p, const ConvPlan& plan) {
  return plan.split_k == 1 ? 0 : static_cast<int64_t>(plan.split_k) * p.rows * p.epilogue.k;
}

int64_t conv_statistics_numel(const ConvParams& p, const ConvPlan& plan) {
  const int slabs = written_slabs(p, plan);
  return (slabs + (slabs > kMergedSlabs ? kMergedSlabs : 0)) * int64_t{2} * p.epilogue.k;
}

cudaError_t conv_bn_add_relu(ConvParams p, ConvPrecision precision, const ConvPlan& plan,
                             bool aligned, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool by_packs = conv_by_packs(p, precision, aligned);
  if ((!by_packs && p.second.c > 0) || is_excluded(p, plan)) return cudaErrorInvalidValue;
  if (plan.tile < first_conv_tile(p, precision, aligned)) return cudaErrorInvalidValue;
  p.epilogue.vector = finishes_by_packs(p, precision, aligned);
  const ConvLaunch call{p, plan.tile, plan.split_k, by_packs, epilogue_of(p, plan)};
  switch (precision) {
    case ConvPrecision::kFloat16:
      return launch_conv<Float16>(call, stream);
    case ConvPrecision::kBFloat16:
      return launch_conv<BFloat16>(call, stream);
    case ConvPrecision::kTf32:
      return launch_conv<Tf32>(call, stream);
    default:
      return launch_conv<Float32>(call, stream);
  }
}

cudaError_t conv_statistics(const ConvParams& p, const ConvPlan& plan, float* mean, float* var,
                            cudaStream_t stream) {
  const unsigned groups = static_cast<unsigned>(ceil_div(p.epilogue.k, kStatisticsLanes));
  const int slabs = written_slabs(p, plan);
  ConvStatisticsParams args{p.statistics, nullptr, mean, var, slabs, slabs};
  args.slab_rows = kTiles[plan.tile].slab_rows;
  args.rows = p.rows;
  args.k = p.epilogue.k;
  const auto run = [&](unsigned blocks) {
    return launch(conv_statistics_kernel, dim3(groups, blocks),
                  dim3(kStatisticsLanes, kStatisticsWays),
                  kStatisticsLanes * kStatisticsWays * sizeof(Moments<1>), stream, args);
  };
  if (slabs > kMergedSlabs) {
    args.span = static_cast<int>(ceil_div(slabs, kMergedSlabs));
    args.merged = p.statistics + static_cast<int64_t>(slabs) * 2 * args.k;
    const unsigned blocks = static_cast<unsigned>(ceil_div(slabs, args.span));
    if (const cudaError_t error = run(blocks); error != cudaSuccess) return error;
    args.slabs = args.merged;
    args.merged = nullptr;
    args.slab_rows *= args.span;
    args.count = args.span = static_cast<int>(blocks);
  }
  return run(1);
}

}  // namespace fr
