// Filters from the order in which a parameter has them to that of the kernels, and gradients back.
//
// Either order is a small matrix for each filter, of channels and taps, and the other one is its
// transpose. Bytes: each element read once and written once; a filter stays in the L1 cache.
#pragma once

#include "../conv_bn_add_relu.h"
#include "table.h"

namespace fr {
namespace FR_ISA {

template <class From, class To>
void transpose_filters(const FilterCopy& f, int64_t begin, int64_t end) {
  const int64_t numel = f.rows * f.columns;
  for (int64_t k = begin; k < end; ++k) {
    const From* const from = static_cast<const From*>(f.from) + k * numel;
    To* const to = static_cast<To*>(f.to) + k * numel;
    for (int64_t column = 0; column < f.columns; ++column) {
      for (int64_t row = 0; row < f.rows; ++row) {
        from_acc(to_acc(from[row * f.columns + column]), to + column * f.rows + row);
      }
    }
  }
}

template <class T>
void copy_filters(const FilterCopy& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const auto copy = f.from_wide ? (f.to_wide ? transpose_filters<A, A> : transpose_filters<A, T>)
                                : (f.to_wide ? transpose_filters<T, A> : transpose_filters<T, T>);
  copy(f, begin, end);
}

}  // namespace FR_ISA
}  // namespace fr
