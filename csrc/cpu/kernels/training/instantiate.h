// The training kernels of one instruction set, for every storage type. Each isa_*.cpp includes this
// once.
#pragma once

#include "direct.h"
#include "few_channels.h"
#include "filters.h"
#include "passes.h"
#include "stem.h"
#include "winograd_table.h"

namespace fr {
namespace FR_ISA {

// Double's convolutions are PyTorch's.
template <class T>
constexpr TrainingConv direct_or_none() {
  if constexpr (sizeof(Acc<T>) == sizeof(float)) return direct_of<T>();
  return {};
}
template <class T>
constexpr TrainingConv winograd_or_none() {
  if constexpr (sizeof(Acc<T>) == sizeof(float)) return winograd_training_of<T>();
  return {};
}
template <class T>
constexpr TrainingConv few_channels_or_none() {
  if constexpr (sizeof(Acc<T>) == sizeof(float)) return few_channels_of<T>();
  return {};
}

template <class T>
constexpr TrainingKernels training_kernels_of() {
  return {block_end<T>,    block_end_backward<T>, statistics<T>,         bn_gradient<T>,
          masked_sums<T>,  stem_end<T>,           stem_end_backward<T>,  add_parts<Acc<T>>,
          copy_filters<T>, direct_or_none<T>(),   winograd_or_none<T>(), few_channels_or_none<T>()};
}

// In the order of DType.
constexpr TrainingTable make_training_table() {
  return {{training_kernels_of<float>(), training_kernels_of<double>(),
           training_kernels_of<BFloat16>(), training_kernels_of<Half>()}};
}

}  // namespace FR_ISA
}  // namespace fr
