// The kernels of one instruction set, for every storage type. Each isa_*.cpp includes this once.
#pragma once

#include "activation.h"
#include "add_relu.h"
#include "average.h"
#include "bn_add_relu.h"
#include "conv_bn_add_relu.h"
#include "linear.h"
#include "max_pool.h"
#include "pack_conv_weight.h"
#include "peak.h"
#include "winograd.h"

namespace fr {
namespace FR_ISA {

template <class T>
constexpr Kernels kernels_of() {
  return {bn_forward<T>,
          bn_statistics<T>,
          bn_backward_reduce<T>,
          bn_backward_apply<T>,
          all_panels<Acc<T>>,
          conv_scratch_bytes<T>,
          conv<T>,
          max_pool<T>,
          max_pool<T>,
          avg_pool<T>,
          global_avg_pool<T>,
          linear<T>,
          add_relu<T>,
          activate<T>,
          pack<T>,
          unpack<T>,
          packed_numel<T>,
          sizeof(Acc<T>) == sizeof(double) ? kFloat64 : kFloat32};
}

// In the order of DType.
constexpr KernelTable make_table(const char* isa) {
  return {isa,
          kPanel<float>,
          {kMaxTile, kMostPixels<double>, kMaxTile, kMaxTile},
          {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(), kernels_of<Half>()},
          {{winograd_of<4, float, float>(), winograd_of<2, float, float>()},
           {},
           {winograd_of<4, BFloat16, float>(), winograd_of<2, BFloat16, float>()},
           {winograd_of<4, Half, float>(), winograd_of<2, Half, float>()}},
          {multiply_add<float>, multiply_add<double>, nullptr, read_memory, copy_memory}};
}

}  // namespace FR_ISA
}  // namespace fr
