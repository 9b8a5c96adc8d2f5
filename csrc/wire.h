// The 64-bit values in which LibTorch's stable interface passes arguments and results.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fr {

template <class T>
StableIValue to_wire(const T& value) {
  return torch::stable::detail::from(value);
}

template <class T>
T from_wire(StableIValue wire) {
  return torch::stable::detail::to<T>(wire);
}

}  // namespace fr
