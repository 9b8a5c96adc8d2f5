// Max-pool over channels-last rows, the second half of the stem. A NaN in the window is the result,
// as in torch's max_pool2d. Reads each input row kernel_h / stride_h times, from the cache, and
// writes the result once.
#pragma once

#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// A window of the map, clipped at the map's edges. `count` has the pixels of the padding too.
template <class T>
struct Window {
  const T* first;
  int64_t rows, cols, count;
  int64_t row, pixel;  // distances, in elements
};

// Calls visit(window, address of the result's pixel) for each pixel of the result.
template <class T, class Visit>
FR_INLINE void visit_windows(const PoolForward& f, Visit visit) {
  const T* x = static_cast<const T*>(f.x);
  T* y = static_cast<T*>(f.y);
  const int64_t out_w = f.out_w();
  for (int64_t oy = f.row0; oy < f.row1; ++oy) {
    const int64_t y0 = f.first_row(oy), y1 = f.end_row(oy + 1);
    const int64_t high = min_of(f.kernel_h, f.h + 2 * f.pad_h - oy * f.stride_h);
    for (int64_t ox = 0; ox < out_w; ++ox) {
      const int64_t left = ox * f.stride_w - f.pad_w;
      const int64_t x0 = max_of(left, 0), x1 = min_of(left + f.kernel_w, f.w);
      const int64_t count = high * min_of(f.kernel_w, f.w + f.pad_w - left);
      const T* first = x + ((y0 - f.x_first) * f.w + x0) * f.c;
      visit(Window<T>{first, y1 - y0, x1 - x0, count, f.w * f.c, f.c}, y + (oy * out_w + ox) * f.c);
    }
  }
}

template <class V>
FR_INLINE V max_or_nan(V best, V v) {
  best = v > best ? v : best;
  return v != v ? v : best;
}

// The maximum over a window of the channels at c, by `load` and `larger`.
template <class T, class Load, class Larger>
FR_INLINE auto largest(const Window<T>& w, int64_t c, Load load, Larger larger) {
  auto best = load(w.first + c);
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t j = 0; j < w.cols; ++j)
      best = larger(best, load(w.first + i * w.row + j * w.pixel + c));
  }
  return best;
}

template <class T>
void max_pool(const PoolForward& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  visit_windows<T>(f, [&](const Window<T>& w, T* out) {
    const auto vector = [](const T* p) { return load(p); };
    const auto scalar = [](const T* p) { return to_acc(*p); };
    int64_t c = 0;
    for (; c + lanes <= f.c; c += lanes) store(largest(w, c, vector, max_or_nan<Vec<A>>), out + c);
    for (; c < f.c; ++c) from_acc(largest(w, c, scalar, max_or_nan<A>), out + c);
  });
}

}  // namespace FR_ISA
}  // namespace fr
