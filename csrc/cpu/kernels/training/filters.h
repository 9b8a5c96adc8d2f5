// Converts filters from a parameter's order to that of the kernels, and gradients back.
//
// Either order is a small matrix for each filter, of channels and taps, and the other one is its
// transpose. Bytes: each element read once and written once; a filter stays in the L1 cache.
// Squares are transposed in registers: element by element, a network's weights would take longer
// than its convolutions on small images.
#pragma once

#include "../conv_bn_add_relu.h"
#include "../transpose.h"
#include "table.h"

namespace fr {
namespace FR_ISA {

template <class From, class To>
void convert_elements(const From* from, int64_t numel, To* to) {
  constexpr int64_t lanes = kLanes<Acc<From>>;
  int64_t i = 0;
  for (; i + lanes <= numel; i += lanes) store(load(from + i), to + i);
  for (; i < numel; ++i) from_acc(to_acc(from[i]), to + i);
}

// The matrix of one filter. `readable` is the number of elements from `from` to the end of the last
// filter.
template <class From, class To>
struct FilterTranspose {
  using A = Acc<From>;
  static constexpr int64_t kSide = kLanes<A>;

  int64_t rows, columns, readable;
  const From* from;
  To* to;

  void run() const {
    for (int64_t column = 0; column < columns; column += kSide) {
      for (int64_t row = 0; row < rows; row += kSide) {
        const int64_t high = min_of(rows - row, kSide), wide = min_of(columns - column, kSide);
        if (min_of(high, wide) < kSide / 4) {
          by_elements(row, column, high, wide);
        } else {
          by_square(row, column, high, wide);
        }
      }
    }
  }

  void by_elements(int64_t row, int64_t column, int64_t high, int64_t wide) const {
    for (int64_t j = column; j < column + wide; ++j) {
      for (int64_t i = row; i < row + high; ++i) {
        from_acc(to_acc(from[i * columns + j]), to + j * rows + i);
      }
    }
  }

  FR_INLINE void by_square(int64_t row, int64_t column, int64_t high, int64_t wide) const {
    Vec<A> square[kSide]{};
    for (int64_t i = 0; i < high; ++i) square[i] = load_row((row + i) * columns + column, wide);
    transpose<A>(square);
    for (int64_t j = 0; j < wide; ++j) store_row(square[j], (column + j) * rows + row, high);
  }

  // Reads past the row's end where there are elements to read.
  FR_INLINE Vec<A> load_row(int64_t at, int64_t count) const {
    if (count == kSide || at + kSide <= readable) return load(from + at);
    Vec<A> row{};
    for (int64_t i = 0; i < count; ++i) row[i] = to_acc(from[at + i]);
    return row;
  }

  // If a row is the only one of its column, what is written past its end is overwritten by the
  // columns that follow.
  FR_INLINE void store_row(Vec<A> row, int64_t at, int64_t count) const {
    if (count == kSide || (count == rows && at + kSide <= rows * columns)) {
      store(row, to + at);
    } else {
      for (int64_t i = 0; i < count; ++i) from_acc(row[i], to + at + i);
    }
  }
};

template <class From, class To>
void transpose_filters(const FilterCopy& f, int64_t begin, int64_t end) {
  const int64_t numel = f.rows * f.columns;
  const From* const from = static_cast<const From*>(f.from);
  To* const to = static_cast<To*>(f.to);
  if (f.rows == 1 || f.columns == 1) {
    convert_elements(from + begin * numel, (end - begin) * numel, to + begin * numel);
    return;
  }
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = k * numel, readable = end * numel - at;
    FilterTranspose<From, To>{f.rows, f.columns, readable, from + at, to + at}.run();
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
