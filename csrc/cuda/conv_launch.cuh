// Launches the instance of the kernel for a call. Included by the file of each precision.
#pragma once

#include "conv_tiles.cuh"

namespace fr {

template <class T, class Precision, bool kVector, bool kSecond, Epilogue kEpilogue>
cudaError_t launch_instance(const ConvLaunch& call, cudaStream_t stream) {
  ConvParams p = call.params;
  constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(typename Precision::Storage));
  const int steps = (p.depth + kStep - 1) / kStep;
  p.tiles_n = (p.group_k + T::kN - 1) / T::kN;
  p.steps_per_split = (steps + call.splits - 1) / call.splits;
  const int64_t tiles_m = (static_cast<int64_t>(p.rows) + T::kM - 1) / T::kM;
  const dim3 grid(static_cast<unsigned>(tiles_m * p.tiles_n), call.splits,
                  p.epilogue.k / p.group_k);
  return launch(conv_bn_add_relu_kernel<T, Precision, kVector, kSecond, kEpilogue>, grid,
                dim3(T::kThreads), T::kSharedBytes, stream, p);
}

template <class T, class Precision>
cudaError_t launch_tile(const ConvLaunch& call, cudaStream_t stream) {
  if (call.params.second.c > 0) {
    return launch_instance<T, Precision, true, true, Epilogue::kPacks>(call, stream);
  }
  switch (call.epilogue) {
    case Epilogue::kResidual:
      return launch_instance<T, Precision, true, false, Epilogue::kResidual>(call, stream);
    case Epilogue::kStatistics:
      return launch_instance<T, Precision, true, false, Epilogue::kStatistics>(call, stream);
    case Epilogue::kPartial:
      return launch_instance<T, Precision, true, false, Epilogue::kPartial>(call, stream);
    default:
      return launch_instance<T, Precision, true, false, Epilogue::kPacks>(call, stream);
  }
}

// Only the smallest tile has the rare cases: x or y whose channels do not come in packs, and two
// convolutions in one sum that is split.
template <class T, class Precision>
cudaError_t launch_smallest(const ConvLaunch& call, cudaStream_t stream) {
  constexpr Epilogue kAny = Epilogue::kElements;
  if (call.vector && call.epilogue != kAny) {
    if (call.params.second.c == 0 || call.epilogue != Epilogue::kPartial) {
      return launch_tile<T, Precision>(call, stream);
    }
    return launch_instance<T, Precision, true, true, Epilogue::kPartial>(call, stream);
  }
  if (call.params.second.c > 0) {
    return launch_instance<T, Precision, true, true, kAny>(call, stream);
  }
  if (call.vector) return launch_instance<T, Precision, true, false, kAny>(call, stream);
  switch (call.epilogue) {
    case Epilogue::kPacks:
      return launch_instance<T, Precision, false, false, Epilogue::kPacks>(call, stream);
    case Epilogue::kStatistics:
      return launch_instance<T, Precision, false, false, Epilogue::kStatistics>(call, stream);
    default:
      return launch_instance<T, Precision, false, false, kAny>(call, stream);
  }
}

template <class Precision>
cudaError_t launch_conv(const ConvLaunch& call, cudaStream_t stream) {
  using S = typename Precision::Storage;
  using Table = Tiles<Precision>;
  cudaError_t error;
  if (call.tile == 0) {
    error = launch_tile<typename Table::Large, Precision>(call, stream);
  } else if (call.tile == 1) {
    error = launch_tile<typename Table::Tall, Precision>(call, stream);
  } else {
    error = launch_smallest<typename Table::Small, Precision>(call, stream);
  }
  if (error != cudaSuccess || call.splits == 1) return error;
  const int64_t packs =
      static_cast<int64_t>(call.params.rows) * ((call.params.epilogue.k + kPack<S> - 1) / kPack<S>);
  const dim3 grid(static_cast<unsigned>((packs + kFinishThreads - 1) / kFinishThreads));
  return launch(conv_split_finish_kernel<S>, grid, dim3(kFinishThreads), 0, stream, call.params,
                call.splits);
}

}  // namespace fr
