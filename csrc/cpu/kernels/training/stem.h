// The end of the stem: y = maxpool(relu(z * scale + shift)), and its backward.
//
// The normalised map is not stored: each window makes it anew from z, in the cache, and rounds it
// to the map's type, so that ties are those of a map that was. Where in its window the first
// largest lies is kept in a byte, row-major over the kernel. The backward gathers: each element
// looks at the windows over it, so no two write to one place. A NaN is the largest, the last of
// several, as PyTorch's max_pool2d has it.
#pragma once

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

// v as T has it.
template <class T>
FR_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if (sizeof(T) == sizeof(Acc<T>)) return v;
  T all[kLanes<Acc<T>>];
  store(v, all);
  return load(all);
}

template <class T>
void stem_end(const StemEnd& f, int64_t begin, int64_t end) {
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
            const Vec<A> v = rounded<T>(bn_relu(lanes.get(window + (i * p.w + j) * p.c + c), k, b));
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

template <class T>
void stem_end_backward(const StemEndBackward& f, int64_t begin, int64_t end, int64_t block,
                       void* scratch) {
  using A = Acc<T>;
  const PoolForward& p = f.pool;
  const T *dy = static_cast<const T*>(f.dy), *z = static_cast<const T*>(f.z);
  const A *scale = static_cast<const A*>(f.scale), *shift = static_cast<const A*>(f.shift),
          *mean = static_cast<const A*>(f.mean);
  T* g = static_cast<T*>(f.g);
  const int64_t out_h = p.out_h(), out_w = p.out_w();
  const BlockSums<A, kGradientRows> sums{static_cast<A*>(scratch),
                                         f.sums + (f.sums ? block * kGradientRows * p.c : 0), p.c};
  if (f.sums) sums.clear();
  A *sum_g = sums.near, *sum_g_xc = sum_g + kSumGXc * p.c;
  for (int64_t row = begin, pixels = 0; row < end; ++row) {
    const int64_t at_y = row % p.h + p.pad_h;  // in the padded map
    const int64_t y0 = max_of(ceil_div(at_y - p.kernel_h + 1, p.stride_h), 0);
    const int64_t y1 = min_of(at_y / p.stride_h + 1, out_h);
    for (int64_t x = 0; x < p.w; ++x) {
      const int64_t at_x = x + p.pad_w;
      const int64_t x0 = max_of(ceil_div(at_x - p.kernel_w + 1, p.stride_w), 0);
      const int64_t x1 = min_of(at_x / p.stride_w + 1, out_w);
      const int64_t to = (row * p.w + x) * p.c;
      for_columns<A>(p.c, [&](auto lanes, int64_t c) {
        Vec<A> d{};
        for (int64_t oy = y0; oy < y1; ++oy) {
          for (int64_t ox = x0; ox < x1; ++ox) {
            const int place =
                static_cast<int>((at_y - oy * p.stride_h) * p.kernel_w + at_x - ox * p.stride_w);
            const int64_t from = ((row / p.h * out_h + oy) * out_w + ox) * p.c + c;
            const LaneIndex<A> is = load_bytes<A>(lanes, f.index + from) == LaneIndex<A>{} + place;
            d += is ? lanes.get(dy + from) : Vec<A>{};
          }
        }
        const Vec<A> v = lanes.get(z + to + c);
        d = rounded<T>(bn_relu_mask(d, v, lanes.get(scale + c), lanes.get(shift + c)));
        lanes.put(d, g + to + c);
        if (f.sums == nullptr) return;
        lanes.put(lanes.get(sum_g + c) + d, sum_g + c);
        lanes.put(lanes.get(sum_g_xc + c) + d * (v - lanes.get(mean + c)), sum_g_xc + c);
      });
    }
    pixels += p.w;
    if (f.sums && (pixels + p.w > kSumRows || row + 1 == end)) {
      sums.fold(false);
      pixels = 0;
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
