// The sum of two maps and an activation. Reads both and writes the result, once each.
#pragma once

#include "activation.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// Elements [begin, end) of y = activation(x + residual).
template <class T>
void add_relu(const AddForward& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  const T *x = static_cast<const T*>(f.x), *residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  with_activation<A>(f.activation, [&](auto activated) {
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) store(activated(load(x + i) + load(residual + i)), y + i);
    for (; i < end; ++i) from_acc(activated(to_acc(x[i]) + to_acc(residual[i])), y + i);
  });
}

}  // namespace FR_ISA
}  // namespace fr
