// Batch norm, residual and ReLU: y = relu((x - mean) * scale + bias [+ residual]).
//
// Memory-bound: forward reads x (and the residual) and writes y, 2 or 3 elements moved for 4 flops,
// so the one thing to do is touch each once, in order. Training reads x twice more for its
// statistics; a chunk fits the L2 cache, where the second of those passes finds it.
//
// Arithmetic is float64 for float32 maps, which costs nothing where memory is the limit and leaves
// one rounding, the last; float32 for bfloat16 and float16. Sums are float64 always.
//
// Statistics. Each chunk gives per channel its mean and its sum of squared distances from that
// mean, by two passes over the chunk, which loses nothing to cancellation; the host merges the
// chunks in a fixed order in float64 (Chan, Golub and LeVeque, 1979). Deterministic for any number
// of threads.
//
// Backward. With dz the gradient of ReLU's argument (zero where y <= 0) and xc = x - mean:
//   dbias = sum dz,  dweight = sum dz * xc / std,
//   dx = scale * (dz - sum dz / m - xc * sum(dz * xc) / (m * var)) = a * dz + b * xc + c per
//   channel.
//
// Two layouts, one loop each (see MapView): channels-last has a channel per column, contiguous has
// one per row.
#pragma once

#include "activation.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// Arithmetic type of the elementwise kernels, one precision above storage.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<float> {
  using type = double;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// One row of a map. Numbers per channel are vectors of their own (Columns) or the same for the
// whole row (Same); the loops below are written once for both.
template <class A>
struct Columns {
  const A* p;
  FR_INLINE Vec<A> vector(int64_t i) const { return load(p + i); }
  FR_INLINE A scalar(int64_t i) const { return p[i]; }
};
template <class A>
struct Same {
  A v;
  FR_INLINE Vec<A> vector(int64_t) const { return broadcast<A>(v); }
  FR_INLINE A scalar(int64_t) const { return v; }
};

template <class T, class Activated, class P>
FR_INLINE void bn_forward_row(const T* x, const T* residual, T* y, int64_t cols,
                              Activated activated, P mean, P scale, P bias) {
  using A = Wide<T>;
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    Vec<A> v = (Load<A>::from(x + i) - mean.vector(i)) * scale.vector(i) + bias.vector(i);
    if (residual) v += Load<A>::from(residual + i);
    store(activated(v), y + i);
  }
  for (; i < cols; ++i) {
    A v = (A{to_acc(x[i])} - mean.scalar(i)) * scale.scalar(i) + bias.scalar(i);
    if (residual) v += A{to_acc(residual[i])};
    from_acc(activated(v), y + i);
  }
}

template <class T, class Activated>
FR_INLINE void bn_forward_rows(const BnForward& f, int64_t begin, int64_t end,
                               Activated activated) {
  using A = Wide<T>;
  const A* mean = static_cast<const A*>(f.mean);
  const A* scale = static_cast<const A*>(f.scale);
  const A* bias = static_cast<const A*>(f.bias);
  const int64_t cols = f.map.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(f.x) + row * cols;
    const T* residual = f.residual ? static_cast<const T*>(f.residual) + row * cols : nullptr;
    T* y = static_cast<T*>(f.y) + row * cols;
    if (f.map.channels_last) {
      bn_forward_row<T>(x, residual, y, cols, activated, Columns<A>{mean}, Columns<A>{scale},
                        Columns<A>{bias});
    } else {
      const int64_t c = row % f.map.channels;
      bn_forward_row<T>(x, residual, y, cols, activated, Same<A>{mean[c]}, Same<A>{scale[c]},
                        Same<A>{bias[c]});
    }
  }
}

template <class T>
void bn_forward(const BnForward& f, int64_t begin, int64_t end) {
  with_activation<Wide<T>>(f.activation,
                           [&](auto activated) { bn_forward_rows<T>(f, begin, end, activated); });
}

// Sums down the columns of rows [begin, end), `lanes` channels at a time, of what `vector` and
// `scalar` compute from the element at a place. Four rows at once keep four chains of additions
// going.
template <class VectorTerm, class ScalarTerm, class Emit>
FR_INLINE void sum_columns(int64_t begin, int64_t end, int64_t cols, VectorTerm vector,
                           ScalarTerm scalar, Emit emit) {
  constexpr int lanes = kLanes<double>;
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    Vec<double> sum[4] = {};
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) {
      for (int j = 0; j < 4; ++j) sum[j] += vector((row + j) * cols + i, i);
    }
    for (; row < end; ++row) sum[0] += vector(row * cols + i, i);
    const Vec<double> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int lane = 0; lane < lanes; ++lane) emit(i + lane, total[lane]);
  }
  for (; i < cols; ++i) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) sum += scalar(row * cols + i, i);
    emit(i, sum);
  }
}

// The sum along one row of `cols` elements, likewise.
template <class VectorTerm, class ScalarTerm>
FR_INLINE double sum_row(int64_t cols, VectorTerm vector, ScalarTerm scalar) {
  constexpr int lanes = kLanes<double>;
  Vec<double> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= cols; i += 4 * lanes) {
    for (int j = 0; j < 4; ++j) sum[j] += vector(i + j * lanes);
  }
  for (; i + lanes <= cols; i += lanes) sum[0] += vector(i);
  const Vec<double> four = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += four[lane];
  for (; i < cols; ++i) total += scalar(i);
  return total;
}

FR_INLINE Vec<double> square(Vec<double> v) { return v * v; }
FR_INLINE double square(double v) { return v * v; }

// Channels-last: rows [begin, end) are chunk `chunk`. Contiguous: channels [begin, end), and each
// image is a chunk, so `chunk` is not used.
template <class T>
void bn_statistics(const BnStatistics& f, int64_t begin, int64_t end, int64_t chunk) {
  const T* x = static_cast<const T*>(f.x);
  const int64_t cols = f.map.cols;
  const auto vector = [=](int64_t at) { return Load<double>::from(x + at); };
  const auto scalar = [=](int64_t at) { return double{to_acc(x[at])}; };
  if (f.map.channels_last) {
    double* mean = f.mean + chunk * cols;
    double* m2 = f.m2 + chunk * cols;
    const double rows = static_cast<double>(end - begin);
    sum_columns(
        begin, end, cols, [=](int64_t at, int64_t) { return vector(at); },
        [=](int64_t at, int64_t) { return scalar(at); },
        [=](int64_t c, double sum) { mean[c] = sum / rows; });
    sum_columns(
        begin, end, cols,
        [=](int64_t at, int64_t c) { return square(vector(at) - load(mean + c)); },
        [=](int64_t at, int64_t c) { return square(scalar(at) - mean[c]); },
        [=](int64_t c, double sum) { m2[c] = sum; });
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t row = c; row < f.map.rows; row += f.map.channels) {
      const int64_t at = row * cols;
      const double sum = sum_row(
          cols, [=](int64_t i) { return vector(at + i); },
          [=](int64_t i) { return scalar(at + i); });
      const double mean = sum / static_cast<double>(cols);
      f.mean[row] = mean;
      f.m2[row] = sum_row(
          cols, [=](int64_t i) { return square(vector(at + i) - broadcast<double>(mean)); },
          [=](int64_t i) { return square(scalar(at + i) - mean); });
    }
  }
}

// dz of one element or vector, from the gradient and the output.
template <class T, class A, class Gradient>
struct Masked {
  const T* grad;
  const T* y;  // null: no activation
  Gradient gradient;

  FR_INLINE Vec<A> vector(int64_t at) const {
    const Vec<A> g = Load<A>::from(grad + at);
    return y ? gradient(g, Load<A>::from(y + at)) : g;
  }
  FR_INLINE A scalar(int64_t at) const {
    const A g = to_acc(grad[at]);
    return y ? gradient(g, A{to_acc(y[at])}) : g;
  }
};

template <class T>
void copy_masked(const BnBackward& f, int64_t begin, int64_t end) {
  using A = Wide<T>;
  constexpr int lanes = kLanes<A>;
  T* to = static_cast<T*>(f.dz);
  with_gradient<A>(f.activation, [&](auto gradient) {
    const Masked<T, A, decltype(gradient)> dz{static_cast<const T*>(f.grad),
                                              static_cast<const T*>(f.y), gradient};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) store(dz.vector(i), to + i);
    for (; i < end; ++i) from_acc(dz.scalar(i), to + i);
  });
}

template <class T, class Gradient>
FR_INLINE void reduce_backward(const BnBackward& f, int64_t begin, int64_t end, int64_t chunk,
                               Gradient gradient) {
  using A = Wide<T>;
  const Masked<T, double, Gradient> dz{static_cast<const T*>(f.grad), static_cast<const T*>(f.y),
                                       gradient};
  const T* x = static_cast<const T*>(f.x);
  const A* mean = static_cast<const A*>(f.mean);
  const int64_t cols = f.map.cols;
  if (f.map.channels_last) {
    double* sum_dz = f.sum_dz + chunk * cols;
    double* sum_dz_xc = f.sum_dz_xc + chunk * cols;
    sum_columns(
        begin, end, cols, [=](int64_t at, int64_t) { return dz.vector(at); },
        [=](int64_t at, int64_t) { return dz.scalar(at); },
        [=](int64_t c, double sum) { sum_dz[c] = sum; });
    sum_columns(
        begin, end, cols,
        [=](int64_t at, int64_t c) {
          return dz.vector(at) * (Load<double>::from(x + at) - Load<double>::from(mean + c));
        },
        [=](int64_t at, int64_t c) { return dz.scalar(at) * (to_acc(x[at]) - double{mean[c]}); },
        [=](int64_t c, double sum) { sum_dz_xc[c] = sum; });
    if (f.dz) copy_masked<T>(f, begin * cols, end * cols);
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    const double m = mean[c];
    for (int64_t row = c; row < f.map.rows; row += f.map.channels) {
      const int64_t at = row * cols;
      f.sum_dz[row] = sum_row(
          cols, [=](int64_t i) { return dz.vector(at + i); },
          [=](int64_t i) { return dz.scalar(at + i); });
      f.sum_dz_xc[row] = sum_row(
          cols,
          [=](int64_t i) {
            return dz.vector(at + i) * (Load<double>::from(x + at + i) - broadcast<double>(m));
          },
          [=](int64_t i) { return dz.scalar(at + i) * (to_acc(x[at + i]) - m); });
      if (f.dz) copy_masked<T>(f, at, at + cols);
    }
  }
}

template <class T>
void bn_backward_reduce(const BnBackward& f, int64_t begin, int64_t end, int64_t chunk) {
  with_gradient<double>(f.activation,
                        [&](auto gradient) { reduce_backward<T>(f, begin, end, chunk, gradient); });
}

template <class T, class Gradient, class P>
FR_INLINE void bn_backward_row(const Masked<T, Wide<T>, Gradient>& dz, const T* x, int64_t at,
                               T* dx, int64_t cols, P mean, P a, P b, P c) {
  using A = Wide<T>;
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    const Vec<A> xc = Load<A>::from(x + at + i) - mean.vector(i);
    store(a.vector(i) * dz.vector(at + i) + (b.vector(i) * xc + c.vector(i)), dx + at + i);
  }
  for (; i < cols; ++i) {
    const A xc = A{to_acc(x[at + i])} - mean.scalar(i);
    from_acc(a.scalar(i) * dz.scalar(at + i) + (b.scalar(i) * xc + c.scalar(i)), dx + at + i);
  }
}

template <class T, class Gradient, class P>
FR_INLINE void bn_backward_row(const Masked<T, Wide<T>, Gradient>& dz, int64_t at, T* dx,
                               int64_t cols, P a) {
  constexpr int lanes = kLanes<Wide<T>>;
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) store(a.vector(i) * dz.vector(at + i), dx + at + i);
  for (; i < cols; ++i) from_acc(a.scalar(i) * dz.scalar(at + i), dx + at + i);
}

template <class T, class Gradient>
FR_INLINE void apply_backward(const BnBackward& f, int64_t begin, int64_t end, Gradient gradient) {
  using A = Wide<T>;
  const Masked<T, A, Gradient> dz{static_cast<const T*>(f.grad), static_cast<const T*>(f.y),
                                  gradient};
  const T* x = static_cast<const T*>(f.x);
  T* dx = static_cast<T*>(f.dx);
  const A* mean = static_cast<const A*>(f.mean);
  const A* a = static_cast<const A*>(f.a);
  const A* b = static_cast<const A*>(f.b);
  const A* c = static_cast<const A*>(f.c);
  const int64_t cols = f.map.cols;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols, k = row % f.map.channels;
    if (f.map.channels_last && b) {
      bn_backward_row<T>(dz, x, at, dx, cols, Columns<A>{mean}, Columns<A>{a}, Columns<A>{b},
                         Columns<A>{c});
    } else if (f.map.channels_last) {
      bn_backward_row<T>(dz, at, dx, cols, Columns<A>{a});
    } else if (b) {
      bn_backward_row<T>(dz, x, at, dx, cols, Same<A>{mean[k]}, Same<A>{a[k]}, Same<A>{b[k]},
                         Same<A>{c[k]});
    } else {
      bn_backward_row<T>(dz, at, dx, cols, Same<A>{a[k]});
    }
  }
}

template <class T>
void bn_backward_apply(const BnBackward& f, int64_t begin, int64_t end) {
  with_gradient<Wide<T>>(f.activation,
                         [&](auto gradient) { apply_backward<T>(f, begin, end, gradient); });
}

}  // namespace FR_ISA
}  // namespace fr
