#include "conv_tiles.cuh"
#include "kernels/residual_block.cuh"
#include "residual_block.h"

namespace fr {
namespace {

template <class T, class Precision>
cudaError_t launch_block(const ResidualBlockCall& call, cudaStream_t stream) {
  const ResidualBlockParams p{call.first, call.weight2, call.second};
  const dim3 grid(static_cast<unsigned>((static_cast<int64_t>(p.first.rows) + T::kM - 1) / T::kM));
  return launch(residual_block_kernel<T, Precision>, grid, dim3(T::kThreads), T::kSharedBytes,
                stream, p);
}

template <class Precision>
cudaError_t launch_precision(const ResidualBlockCall& call, cudaStream_t stream) {
  return call.first.epilogue.k == Tiles<Precision>::Tall::kN
             ? launch_block<typename Tiles<Precision>::Tall, Precision>(call, stream)
             : launch_block<typename Tiles<Precision>::Large, Precision>(call, stream);
}

}  // namespace

bool residual_block_fits(const ResidualBlockCall& call, ConvPrecision precision, bool aligned) {
  const int middle = call.first.epilogue.k;
  const bool half = precision == ConvPrecision::kFloat16 || precision == ConvPrecision::kBFloat16;
  return half && (middle == Tiles<void>::Tall::kN || middle == Tiles<void>::Large::kN) &&
         call.first.group_k == middle && call.second.k % 8 == 0 &&
         conv_by_packs(call.first, precision, aligned);
}

cudaError_t residual_block(const ResidualBlockCall& call, ConvPrecision precision,
                           cudaStream_t stream) {
  if (call.first.rows == 0) return cudaSuccess;
  return precision == ConvPrecision::kFloat16 ? launch_precision<Float16>(call, stream)
                                              : launch_precision<BFloat16>(call, stream);
}

}  // namespace fr
