// The passes of a training step over a channels-last map that no convolution carries.
//
//   block_end            y = activation(z * scale + shift [+ shortcut [* scale + shift]])
//   block_end_backward   g = dy through the activation, and its sums: sum g, sum g (z - mean),
//                        sum g (shortcut - mean)
//
//   statistics, bn_gradient, masked_sums: what a convolution without a kernel of its own leaves out
//
// Memory-bound: 2 to 4 elements moved for 3 to 8 flops, so each is touched once, in order. The
// arithmetic is float32 (float64 for float64 maps): more would halve the lanes. Sums are float32
// over one block of rows and float64 between blocks.
#pragma once

#include "../activation.h"
#include "columns.h"
#include "fusion.h"

namespace fr {
namespace FR_ISA {

// The sum over some rows of what `term` computes for the r-th.
template <class V, int kCount, class Term>
FR_INLINE V sum_rows(Constant<kCount>, Term term) {
  if constexpr (kCount == 4) {
    return (term(0) + term(1)) + (term(2) + term(3));
  } else {
    V sum = term(0);
    for (int r = 1; r < kCount; ++r) sum += term(r);
    return sum;
  }
}

template <class L, class A>
FR_INLINE void add_to(L lanes, Vec<A> v, A* sum) {
  lanes.put(lanes.get(sum) + v, sum);
}

template <class T, class Activated>
FR_INLINE void end_block(const BlockEnd& f, int64_t begin, int64_t end, Activated activated) {
  using A = Acc<T>;
  const T *z = static_cast<const T*>(f.z), *shortcut = static_cast<const T*>(f.shortcut);
  const A *scale = static_cast<const A*>(f.scale), *shift = static_cast<const A*>(f.shift);
  const A *scale2 = static_cast<const A*>(f.shortcut_scale),
          *shift2 = static_cast<const A*>(f.shortcut_shift);
  const WrittenMap<T> y(f.y, f.rows, f.channels);
  const int64_t step = f.channels;
  const auto run = [&](auto shortcut_of) {
    for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t c) {
      const Vec<A> k = lanes.get(scale + c), b = lanes.get(shift + c);
      const auto added = shortcut_of(lanes, c);
      for (int r = 0; r < rows.value; ++r) {
        const int64_t i = first + r * step;
        y.put(lanes, activated(lanes.get(z + i) * k + b + added(i)), i);
      }
    });
  };
  if (shortcut == nullptr) {
    run([](auto, int64_t) { return [](int64_t) { return Vec<A>{}; }; });
  } else if (scale2 == nullptr) {
    run([=](auto lanes, int64_t) { return [=](int64_t i) { return lanes.get(shortcut + i); }; });
  } else {
    run([=](auto lanes, int64_t c) {
      const Vec<A> k = lanes.get(scale2 + c), b = lanes.get(shift2 + c);
      return [=](int64_t i) { return lanes.get(shortcut + i) * k + b; };
    });
  }
}

template <class T>
void block_end(const BlockEnd& f, int64_t begin, int64_t end) {
  with_activation<Acc<T>>(f.activation,
                          [&](auto activated) { end_block<T>(f, begin, end, activated); });
}

template <class T, class Gradient>
FR_INLINE void end_block_backward(const BlockEndBackward& f, int64_t begin, int64_t end,
                                  int64_t block, void* scratch, Gradient gradient) {
  using A = Acc<T>;
  const T *dy = static_cast<const T*>(f.dy), *y = static_cast<const T*>(f.y);
  const T *z = static_cast<const T*>(f.z), *shortcut = static_cast<const T*>(f.shortcut);
  const A *mean = static_cast<const A*>(f.mean), *mean2 = static_cast<const A*>(f.shortcut_mean);
  const WrittenMap<T> g(f.g, f.rows, f.channels);
  const bool stored = f.g != nullptr;
  const int64_t step = f.channels;
  const auto masked = [=](auto lanes, int64_t i) {
    const Vec<A> v = lanes.get(dy + i);
    const Vec<A> d = y ? gradient(v, lanes.get(y + i)) : v;
    if (stored) g.put(lanes, d, i);
    return d;
  };
  if (f.sums == nullptr) {
    for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t) {
      for (int r = 0; r < rows.value; ++r) masked(lanes, first + r * step);
    });
    return;
  }
  const BlockSums<A, kBlockEndRows> sums{static_cast<A*>(scratch),
                                         f.sums + block * kBlockEndRows * step, step};
  sums.clear();
  A *sum_g = sums.near, *sum_g_xc = sum_g + kSumGXc * step,
    *sum_g_shortcut_xc = sum_g + kSumGShortcutXc * step;
  for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t c) {
    Vec<A> d[rows.value];
    for (int r = 0; r < rows.value; ++r) d[r] = masked(lanes, first + r * step);
    const auto sum_with = [&](const T* map, const A* center) {
      const Vec<A> at = lanes.get(center + c);
      return sum_rows<Vec<A>>(
          rows, [&](int r) { return d[r] * (lanes.get(map + first + r * step) - at); });
    };
    add_to(lanes, sum_rows<Vec<A>>(rows, [&](int r) { return d[r]; }), sum_g + c);
    add_to(lanes, sum_with(z, mean), sum_g_xc + c);
    if (shortcut) add_to(lanes, sum_with(shortcut, mean2), sum_g_shortcut_xc + c);
  });
  sums.fold(false);
}

template <class T>
void block_end_backward(const BlockEndBackward& f, int64_t begin, int64_t end, int64_t block,
                        void* scratch) {
  with_gradient<Acc<T>>(f.activation, [&](auto gradient) {
    end_block_backward<T>(f, begin, end, block, scratch, gradient);
  });
}

template <class T>
void statistics(const Statistics& f, int64_t begin, int64_t end, int64_t block, void* scratch) {
  using A = Acc<T>;
  const T* z = static_cast<const T*>(f.z);
  const int64_t step = f.channels;
  const BlockSums<A, kStatisticsRows> sums{static_cast<A*>(scratch),
                                           f.sums + block * kStatisticsRows * step, step};
  sums.clear();
  A *pivot = sums.near + kPivot * step, *sum = sums.near + kSumFromPivot * step,
    *squares = sums.near + kSquaresFromPivot * step;
  // Near the mean, so that the squares are of deviations: the mean of some rows.
  const int64_t some = min_of(end - begin, 16);
  for_columns<A>(step, [&](auto lanes, int64_t c) {
    Vec<A> first{};
    for (int64_t r = 0; r < some; ++r) first += lanes.get(z + (begin + r) * step + c);
    lanes.put(first * (A(1) / static_cast<A>(some)), pivot + c);
  });
  for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t c) {
    const Vec<A> at = lanes.get(pivot + c);
    Vec<A> d[rows.value];
    for (int r = 0; r < rows.value; ++r) d[r] = lanes.get(z + first + r * step) - at;
    add_to(lanes, sum_rows<Vec<A>>(rows, [&](int r) { return d[r]; }), sum + c);
    add_to(lanes, sum_rows<Vec<A>>(rows, [&](int r) { return d[r] * d[r]; }), squares + c);
  });
  sums.fold(true);
}

template <class T>
void bn_gradient(const BnGradient& f, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T *g = static_cast<const T*>(f.g), *z = static_cast<const T*>(f.z);
  const A *a = static_cast<const A*>(f.a), *b = static_cast<const A*>(f.b),
          *c = static_cast<const A*>(f.c);
  T* dz = static_cast<T*>(f.dz);
  const int64_t step = f.channels;
  for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t k) {
    const Vec<A> slope = lanes.get(a + k);
    if (z == nullptr) {
      for (int r = 0; r < rows.value; ++r) {
        const int64_t i = first + r * step;
        lanes.put(slope * lanes.get(g + i), dz + i);
      }
      return;
    }
    const Vec<A> bs = lanes.get(b + k), cs = lanes.get(c + k);
    for (int r = 0; r < rows.value; ++r) {
      const int64_t i = first + r * step;
      lanes.put(bn_gradient_of(lanes.get(g + i), lanes.get(z + i), slope, bs, cs), dz + i);
    }
  });
}

template <class T, class Gradient>
FR_INLINE void mask_and_sum(const MaskedSums& f, int64_t begin, int64_t end, int64_t block,
                            void* scratch, Gradient gradient) {
  using A = Acc<T>;
  T* g = static_cast<T*>(f.g);
  const T* x = static_cast<const T*>(f.x);
  const A *scale = static_cast<const A*>(f.scale), *shift = static_cast<const A*>(f.shift),
          *mean = static_cast<const A*>(f.mean);
  const int64_t step = f.channels;
  if (f.sums == nullptr) {
    for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t c) {
      const Vec<A> k = lanes.get(scale + c), b = lanes.get(shift + c);
      for (int r = 0; r < rows.value; ++r) {
        const int64_t i = first + r * step;
        lanes.put(gradient(lanes.get(g + i), lanes.get(x + i) * k + b), g + i);
      }
    });
    return;
  }
  const BlockSums<A, kGradientRows> sums{static_cast<A*>(scratch),
                                         f.sums + block * kGradientRows * step, step};
  sums.clear();
  A *sum_g = sums.near, *sum_g_xc = sum_g + kSumGXc * step;
  for_rows<A>(begin, end, step, [&](auto lanes, auto rows, int64_t first, int64_t c) {
    const Vec<A> k = lanes.get(scale + c), b = lanes.get(shift + c), at = lanes.get(mean + c);
    Vec<A> d[rows.value], xc[rows.value];
    for (int r = 0; r < rows.value; ++r) {
      const int64_t i = first + r * step;
      const Vec<A> v = lanes.get(x + i);
      d[r] = gradient(lanes.get(g + i), v * k + b);
      xc[r] = v - at;
      lanes.put(d[r], g + i);
    }
    add_to(lanes, sum_rows<Vec<A>>(rows, [&](int r) { return d[r]; }), sum_g + c);
    add_to(lanes, sum_rows<Vec<A>>(rows, [&](int r) { return d[r] * xc[r]; }), sum_g_xc + c);
  });
  sums.fold(false);
}

template <class T>
void masked_sums(const MaskedSums& f, int64_t begin, int64_t end, int64_t block, void* scratch) {
  with_gradient<Acc<T>>(f.activation, [&](auto gradient) {
    mask_and_sum<T>(f, begin, end, block, scratch, gradient);
  });
}

template <class A>
void add_parts(const void* parts, int64_t count, int64_t numel, int64_t begin, int64_t end,
               void* to) {
  const A* from = static_cast<const A*>(parts);
  A* sum = static_cast<A*>(to);
  for_columns<A>(end - begin, [&](auto lanes, int64_t i) {
    Vec<A> v = lanes.get(from + begin + i);
    for (int64_t p = 1; p < count; ++p) v += lanes.get(from + p * numel + begin + i);
    lanes.put(v, sum + begin + i);
  });
}

}  // namespace FR_ISA
}  // namespace fr
