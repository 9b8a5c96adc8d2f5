// Averages over channels-last maps: of windows, and of all pixels. Each input element is read once
// for every window that it is in. A channel's sum is added up in the order of the pixels, by
// whichever vector or scalar holds it.
#pragma once

#include "max_pool.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// The sum over a window of the channels at c.
template <class V, class T, class Load>
FR_INLINE V window_sum(const Window<T>& w, int64_t c, Load load) {
  V sum{};
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t j = 0; j < w.cols; ++j) sum += load(w.first + i * w.row + j * w.pixel + c);
  }
  return sum;
}

// Zeros of the padding count, but not what lies beyond it in ceil_mode. Divides as PyTorch does,
// whose result has the same bits.
template <class T>
void avg_pool(const PoolForward& f) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  visit_windows<T>(f, [&](const Window<T>& w, T* out) {
    const A count = static_cast<A>(w.count);
    const auto vector = [](const T* p) { return load(p); };
    const auto scalar = [](const T* p) { return to_acc(*p); };
    int64_t c = 0;
    for (; c + lanes <= f.c; c += lanes)
      store(window_sum<Vec<A>>(w, c, vector) / broadcast(count), out + c);
    for (; c < f.c; ++c) from_acc(window_sum<A>(w, c, scalar) / count, out + c);
  });
}

// Averages of kVectors vectors of channels. Sums of rows are added up, so that a chain of additions
// is no longer than a row or a column of the map.
template <class T, int kVectors>
FR_INLINE void average_vectors(const MeanForward& f, const T* x, T* y) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> total[kVectors] = {};
  for (int64_t i = 0; i < f.h; ++i) {
    Vec<A> sum[kVectors] = {};
    for (int64_t j = 0; j < f.w; ++j, x += f.c) {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(x + v * lanes);
    }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
  const Vec<A> count = broadcast(static_cast<A>(f.h * f.w));
  for (int v = 0; v < kVectors; ++v) store(total[v] / count, y + v * lanes);
}

template <class T>
void global_avg_pool(const MeanForward& f, int64_t n, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>, kVectors = 4;
  const T* x = static_cast<const T*>(f.x) + n * f.h * f.w * f.c;
  T* y = static_cast<T*>(f.y) + n * f.c;
  int64_t c = c0;
  for (; c + kVectors * lanes <= c1; c += kVectors * lanes)
    average_vectors<T, kVectors>(f, x + c, y + c);
  for (; c + lanes <= c1; c += lanes) average_vectors<T, 1>(f, x + c, y + c);
  for (; c < c1; ++c) {
    A total = 0;
    for (int64_t i = 0; i < f.h; ++i) {
      A sum = 0;
      for (int64_t j = 0; j < f.w; ++j) sum += to_acc(x[(i * f.w + j) * f.c + c]);
      total += sum;
    }
    from_acc(total / static_cast<A>(f.h * f.w), y + c);
  }
}

}  // namespace FR_ISA
}  // namespace fr
