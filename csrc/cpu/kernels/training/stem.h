// The end of the stem: y = maxpool(activation(z * scale + shift)), and its backward.
//
// The normalised map is not stored: each window recomputes it from z, in the cache, and rounds it
// to the map's type, so that ties are those of a stored map. The position of the first largest
// element in its window is kept in a byte, row-major over the kernel. The backward gathers: each
// element looks at the windows that cover it, so no two threads write to one place. A NaN is the
// largest, and the last of several counts, as in PyTorch's max_pool2d.
#pragma once

#include "../activation.h"
#include "columns.h"
#include "fusion.h"

namespace fr {
namespace FR_ISA {

template <class A>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(kLanes<A>)));
};
template <class A>
using Bytes = typename BytesOf<A>::type;  // one for each lane

template <class A>
FR_INLINE LaneIndex<A> load_bytes(Whole, const uint8_t* p) {
  return __builtin_convertvector(load_raw<Bytes<A>>(p), LaneIndex<A>);
}
template <class A>
FR_INLINE LaneIndex<A> load_bytes(Part lanes, const uint8_t* p) {
  uint8_t all[kLanes<A>] = {};
  for (int64_t i = 0; i < lanes.count; ++i) all[i] = p[i];
  return load_bytes<A>(Whole{}, all);
}
template <class A>
FR_INLINE void store_bytes(Whole, LaneIndex<A> v, uint8_t* p) {
  const Bytes<A> bytes = __builtin_convertvector(v, Bytes<A>);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}
template <class A>
FR_INLINE void store_bytes(Part lanes, LaneIndex<A> v, uint8_t* p) {
  uint8_t all[kLanes<A>];
  store_bytes<A>(Whole{}, v, all);
  for (int64_t i = 0; i < lanes.count; ++i) p[i] = all[i];
}

// v rounded to T.
template <class T>
FR_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if (sizeof(T) == sizeof(Acc<T>)) return v;
  T all[kLanes<Acc<T>>];
  store(v, all);
  return load(all);
}

template <class T, class Activated>
FR_INLINE void end_stem(const StemEnd& f, int64_t begin, int64_t end, Activated activated) {
  using A = Acc<T>;
  const PoolForward& p = f.pool;
  const T* z = static_cast<const T*>(f.z);
  const A *scale = static_cast<const A*>(f.scale), *shift = static_cast<const A*>(f.shift);
  T* y = static_cast<T*>(f.y);
  const int64_t out_h = p.out_h(), out_w = p.out_w();
  for (int64_t row = begin; row < end; ++row) {
    const T* image = z + row / out_h * p.h * p.w * p.c;
    const int64_t top = row % out_h * p.stride_h - p.pad_h;
    const int64_t i0 = max_of(-top, 0), i1 = min_of(p.kernel_h, p.h - top);
    for (int64_t ox = 0; ox < out_w; ++ox) {
      const int64_t left = ox * p.stride_w - p.pad_w;
      const int64_t j0 = max_of(-left, 0), j1 = min_of(p.kernel_w, p.w - left);
      const T* window = image + (top * p.w + left) * p.c;
      const int64_t to = (row * out_w + ox) * p.c;
      for_columns<A>(p.c, [&](auto lanes, int64_t c) {
        const Vec<A> k = lanes.get(scale + c), b = lanes.get(shift + c);
        Vec<A> best = broadcast<A>(-__builtin_huge_val());
        LaneIndex<A> index{};
        for (int64_t i = i0; i < i1; ++i) {
          for (int64_t j = j0; j < j1; ++j) {
            const Vec<A> at = lanes.get(window + (i * p.w + j) * p.c + c);
            const Vec<A> v = rounded<T>(activated(at * k + b));
            const LaneIndex<A> larger = (v > best) | (v != v);
            best = larger ? v : best;
            index = larger ? LaneIndex<A>{} + static_cast<int>(i * p.kernel_w + j) : index;
          }
        }
        lanes.put(best, y + to + c);
        store_bytes<A>(lanes, index, f.index + to + c);
      });
    }
  }
}

// Vectors of channels for which the windows over a pixel are found once.
constexpr int kStemVecs = FR_VECTOR_BYTES == 64 ? 4 : 2;

// A row of the map, kVecs vectors of channels from c. Sums go to `sum_g` and `sum_g_xc` if not
// null.
template <int kVecs, class T, class Lanes, class Gradient>
FR_INLINE void stem_end_backward_row(const StemEndBackward& f, int64_t row, Lanes lanes, int64_t c,
                                     Acc<T>* sum_g, Acc<T>* sum_g_xc, Gradient gradient) {
  using A = Acc<T>;
  const PoolForward& p = f.pool;
  const int64_t step = kLanes<A>, out_h = p.out_h(), out_w = p.out_w();
  const int64_t at_y = row % p.h + p.pad_h;  // in the padded map
  const int64_t y0 = max_of(ceil_div(at_y - p.kernel_h + 1, p.stride_h), 0);
  const int64_t y1 = min_of(at_y / p.stride_h + 1, out_h);
  const int64_t images_windows = row / p.h * out_h;
  const T *dy = static_cast<const T*>(f.dy) + c, *z = static_cast<const T*>(f.z) + c;
  const uint8_t* index = f.index + c;
  const WrittenMap<T> g(f.g, f.pixels, p.c);
  Vec<A> scale[kVecs], shift[kVecs], mean[kVecs], total_g[kVecs], total_g_xc[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    scale[v] = lanes.get(static_cast<const A*>(f.scale) + c + v * step);
    shift[v] = lanes.get(static_cast<const A*>(f.shift) + c + v * step);
    mean[v] = lanes.get(static_cast<const A*>(f.mean) + c + v * step);
    total_g[v] = total_g_xc[v] = Vec<A>{};
  }
  int64_t x0 = 0, x1 = 0;  // the windows over a pixel
  for (int64_t x = 0; x < p.w; ++x) {
    const int64_t at_x = x + p.pad_w;
    while (x1 < out_w && x1 * p.stride_w <= at_x) ++x1;
    while (x0 < x1 && x0 * p.stride_w + p.kernel_w <= at_x) ++x0;
    Vec<A> d[kVecs];
    for (int v = 0; v < kVecs; ++v) d[v] = Vec<A>{};
    for (int64_t oy = y0; oy < y1; ++oy) {
      for (int64_t ox = x0; ox < x1; ++ox) {
        const int place =
            static_cast<int>((at_y - oy * p.stride_h) * p.kernel_w + at_x - ox * p.stride_w);
        const int64_t from = ((images_windows + oy) * out_w + ox) * p.c;
        for (int v = 0; v < kVecs; ++v) {
          const LaneIndex<A> largest = load_bytes<A>(lanes, index + from + v * step);
          const LaneIndex<A> is = largest == LaneIndex<A>{} + place;
          d[v] += is ? lanes.get(dy + from + v * step) : Vec<A>{};
        }
      }
    }
    const int64_t to = (row * p.w + x) * p.c;
    for (int v = 0; v < kVecs; ++v) {
      const Vec<A> at = lanes.get(z + to + v * step);
      d[v] = rounded<T>(gradient(d[v], at * scale[v] + shift[v]));
      g.put(lanes, d[v], to + c + v * step);
      total_g[v] += d[v];
      total_g_xc[v] += d[v] * (at - mean[v]);
    }
  }
  if (sum_g == nullptr) return;
  for (int v = 0; v < kVecs; ++v) {
    A *of_g = sum_g + c + v * step, *of_g_xc = sum_g_xc + c + v * step;
    lanes.put(lanes.get(of_g) + total_g[v], of_g);
    lanes.put(lanes.get(of_g_xc) + total_g_xc[v], of_g_xc);
  }
}

template <class T>
void stem_end(const StemEnd& f, int64_t begin, int64_t end) {
  with_activation<Acc<T>>(f.activation,
                          [&](auto activated) { end_stem<T>(f, begin, end, activated); });
}

template <class T, class Gradient>
FR_INLINE void end_stem_backward(const StemEndBackward& f, int64_t begin, int64_t end,
                                 int64_t block, void* scratch, Gradient gradient) {
  using A = Acc<T>;
  constexpr int64_t wide = kStemVecs * kLanes<A>;
  const PoolForward& p = f.pool;
  const BlockSums<A, kGradientRows> sums{static_cast<A*>(scratch),
                                         f.sums + (f.sums ? block * kGradientRows * p.c : 0), p.c};
  if (f.sums) sums.clear();
  A* const sum_g = f.sums ? sums.near : nullptr;
  A* const sum_g_xc = f.sums ? sums.near + kSumGXc * p.c : nullptr;
  for (int64_t row = begin, pixels = 0; row < end; ++row) {
    int64_t c = 0;
    for (; c + wide <= p.c; c += wide) {
      stem_end_backward_row<kStemVecs, T>(f, row, Whole{}, c, sum_g, sum_g_xc, gradient);
    }
    for (; c < p.c; c += kLanes<A>) {
      const int64_t left = p.c - c;
      if (left >= kLanes<A>) {
        stem_end_backward_row<1, T>(f, row, Whole{}, c, sum_g, sum_g_xc, gradient);
      } else {
        stem_end_backward_row<1, T>(f, row, Part{left}, c, sum_g, sum_g_xc, gradient);
      }
    }
    pixels += p.w;
    if (f.sums && (pixels + p.w > kSumRows || row + 1 == end)) {
      sums.fold(false);
      pixels = 0;
    }
  }
}

template <class T>
void stem_end_backward(const StemEndBackward& f, int64_t begin, int64_t end, int64_t block,
                       void* scratch) {
  with_gradient<Acc<T>>(f.activation, [&](auto gradient) {
    end_stem_backward<T>(f, begin, end, block, scratch, gradient);
  });
}

}  // namespace FR_ISA
}  // namespace fr
