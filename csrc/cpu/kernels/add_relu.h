// The sum of two maps, with or without ReLU. Reads both and writes the result, once each.
#pragma once

#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// Elements [begin, end) of y = relu(x + residual).
template <class T>
void add_relu(const AddForward& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  const T *x = static_cast<const T*>(f.x), *residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const Vec<A> floor = relu_floor<A>(f.relu);
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes)
    store(floor_vector(floor, load(x + i) + load(residual + i)), y + i);
  for (; i < end; ++i) {
    const A v = to_acc(x[i]) + to_acc(residual[i]);
    from_acc(f.relu ? relu_scalar(v) : v, y + i);
  }
}

}  // namespace FR_ISA
}  // namespace fr
