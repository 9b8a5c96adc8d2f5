// Shared by the launchers of kernels that traverse a map as bn_walk.cuh describes.
#pragma once

#include <type_traits>

#include "bn_add_relu.h"
#include "kernels/bn_walk.cuh"

namespace fr {

inline dim3 grid_of(const BnMap& map) {
  return dim3(static_cast<unsigned>(map.groups), static_cast<unsigned>(map.slabs));
}

// Calls run(T{}, vector), vector being std::integral_constant<int, kVector>.
template <class T, class Run>
cudaError_t with_vector(bool by_packs, Run run) {
  if (by_packs) return run(T{}, std::integral_constant<int, kPack<T>>{});
  return run(T{}, std::integral_constant<int, 1>{});
}

template <class Run>
cudaError_t with_instance(Storage storage, bool by_packs, Run run) {
  switch (storage) {
    case Storage::kFloat16:
      return with_vector<__half>(by_packs, run);
    case Storage::kBFloat16:
      return with_vector<__nv_bfloat16>(by_packs, run);
    default:
      return with_vector<float>(by_packs, run);
  }
}

}  // namespace fr
