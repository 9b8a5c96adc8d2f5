// Max-pool over channels-last rows: the second half of the stem. NaN wins, as in torch's
// max_pool2d. Reads each input row kernel_h / stride_h times from the cache, writes the result
// once.
#pragma once

#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

template <class V>
FR_INLINE V max_or_nan(V best, V v) {
  best = v > best ? v : best;
  return v != v ? v : best;
}

template <class T>
void max_pool(const PoolForward& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  const T* x = static_cast<const T*>(f.x);
  T* y = static_cast<T*>(f.y);
  const int64_t out_w = f.out_w();
  for (int64_t oy = f.row0; oy < f.row1; ++oy) {
    const int64_t y0 = f.first_row(oy), y1 = f.end_row(oy + 1);
    for (int64_t ox = 0; ox < out_w; ++ox) {
      const int64_t left = ox * f.stride_w - f.pad_w;
      const int64_t x0 = max_of(left, 0), x1 = min_of(left + f.kernel_w, f.w);
      const auto pixel = [&](int64_t i, int64_t j) {
        return x + ((i - f.x_first) * f.w + j) * f.c;
      };
      T* out = y + (oy * out_w + ox) * f.c;
      int64_t c = 0;
      for (; c + lanes <= f.c; c += lanes) {
        Vec<A> best = load(pixel(y0, x0) + c);
        for (int64_t i = y0; i < y1; ++i) {
          for (int64_t j = x0; j < x1; ++j) best = max_or_nan(best, load(pixel(i, j) + c));
        }
        store(best, out + c);
      }
      for (; c < f.c; ++c) {
        A best = to_acc(pixel(y0, x0)[c]);
        for (int64_t i = y0; i < y1; ++i) {
          for (int64_t j = x0; j < x1; ++j) best = max_or_nan(best, to_acc(pixel(i, j)[c]));
        }
        from_acc(best, out + c);
      }
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
