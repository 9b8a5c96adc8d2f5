#include <algorithm>

#include "bn_launch.cuh"
#include "kernels/bn_add_relu.cuh"
#include "kernels/bn_add_relu_backward.cuh"

namespace fr {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 finish_grid(int channels) {
  return dim3(static_cast<unsigned>(ceil_div(channels, kBnFinishChannels)));
}

}  // namespace

BnMap plan_bn(int64_t images, int64_t channels, int64_t plane, bool channels_last, Storage storage,
              bool by_packs, int multiprocessors) {
  // A wave of blocks (see bn_add_relu.cuh), lanes of a warp, and what makes a slab worth a block:
  // items for each thread.
  constexpr int64_t kBlocks = 3, kMostLanes = 32, kLeastItems = 4, kMostSlabs = 65535;
  const int64_t vector = by_packs ? 16 / storage_bytes(storage) : 1;
  const auto as_int = [](int64_t v) { return static_cast<int>(v); };
  BnMap map{};
  map.channels = as_int(channels);
  map.plane = as_int(plane);
  map.lanes = 1;
  if (channels_last) {
    const int64_t packs = channels / vector;
    while (map.lanes < kMostLanes && map.lanes < packs) map.lanes *= 2;
    map.groups = as_int(ceil_div(packs, map.lanes));
    map.items = as_int(images * plane);
  } else {
    map.groups = map.channels;
    map.items_per_image = as_int(plane / vector);
    map.items = as_int(images * map.items_per_image);
  }
  const int64_t rows = kBnThreads / map.lanes;
  const int64_t wave = std::min(kBlocks * multiprocessors / map.groups, kMostSlabs);
  const int64_t slabs = std::clamp<int64_t>(wave, 1, ceil_div(map.items, rows * kLeastItems));
  // Whole rows, so that no slab but the last has an idle thread in its last step.
  map.slab_items = as_int(ceil_div(ceil_div(map.items, slabs), rows) * rows);
  map.slabs = as_int(ceil_div(map.items, map.slab_items));
  return map;
}

int64_t bn_partial_numel(const BnMap& map) {
  return static_cast<int64_t>(map.slabs) * 2 * map.channels;
}

int64_t bn_backward_partial_numel(const BnMap& map) { return 2 * bn_partial_numel(map); }

cudaError_t bn_statistics(const BnStatisticsParams& p, Storage storage, bool by_packs,
                          cudaStream_t stream) {
  return with_instance(storage, by_packs, [&](auto element, auto vector) {
    return launch(bn_statistics_kernel<decltype(element), vector()>, grid_of(p.map),
                  dim3(kBnThreads), kBnThreads * sizeof(Moments<vector()>), stream, p);
  });
}

cudaError_t bn_statistics_finish(const BnStatisticsFinishParams& p, cudaStream_t stream) {
  return launch(bn_statistics_finish_kernel, finish_grid(p.channels), dim3(kBnThreads),
                kBnThreads * sizeof(double), stream, p);
}

cudaError_t bn_add_relu(const BnForwardParams& p, Storage storage, bool by_packs,
                        cudaStream_t stream) {
  return with_instance(storage, by_packs, [&](auto element, auto vector) {
    return launch(bn_add_relu_kernel<decltype(element), vector()>, grid_of(p.map), dim3(kBnThreads),
                  0, stream, p);
  });
}

cudaError_t bn_backward_reduce(const BnBackwardReduceParams& p, Storage storage, bool by_packs,
                               cudaStream_t stream) {
  return with_instance(storage, by_packs, [&](auto element, auto vector) {
    return launch(bn_backward_reduce_kernel<decltype(element), vector()>, grid_of(p.map),
                  dim3(kBnThreads), kBnThreads * sizeof(BnSums<vector()>), stream, p);
  });
}

cudaError_t bn_backward_finish(const BnBackwardFinishParams& p, cudaStream_t stream) {
  return launch(bn_backward_finish_kernel, finish_grid(p.channels), dim3(kBnThreads),
                kBnThreads * sizeof(double), stream, p);
}

cudaError_t bn_backward(const BnBackwardParams& p, Storage storage, bool by_packs,
                        cudaStream_t stream) {
  return with_instance(storage, by_packs, [&](auto element, auto vector) {
    return launch(bn_backward_kernel<decltype(element), vector()>, grid_of(p.map), dim3(kBnThreads),
                  0, stream, p);
  });
}

}  // namespace fr
