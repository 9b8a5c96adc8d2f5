// A fully connected layer: y = relu(x weight^T + bias) for rows of x, weight [K][C] as PyTorch
// stores it. With one image it is bound by reading the weight, 8 MB for 2048 channels and 1000
// classes; with more images a block of rows of the weight stays in the L1 cache for all of them.
//
// Each element of the result is the sum of `lanes` chains over C, one in each lane of a vector. A
// chain of more than kChain additions is cut, and its parts are added up. The chains are added up
// in pairs of halves. So the bits of an element do not depend on the images and the rows that are
// computed beside it.
#pragma once

#include "activation.h"
#include "panels.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// Rows of the weight and images in one microkernel. One image alone takes more rows, since eight
// sums must be in flight to keep two FMA units busy.
constexpr int kLinearRows = 4;
constexpr int kLinearImages = FR_VECTOR_BYTES == 64 ? 6 : 2;
constexpr int kLinearRowsAlone = 8;

// The first `count` elements from p, then zeros.
template <class T>
FR_INLINE Vec<Acc<T>> load_part(const T* p, int64_t count) {
  T part[kLanes<Acc<T>>] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

template <class A>
FR_INLINE A sum_of_lanes(Vec<A> v) {
  A lane[kLanes<A>];
  store(v, lane);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Rows [k, k + kRows) and images [n, n + kImages). Beyond the rows [.., k1) the last one is
// computed again, and nothing is stored.
template <class T, int kRows, int kImages>
void linear_tile(const LinearForward& f, int64_t k, int64_t k1, int64_t n) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>;
  const T* const x = static_cast<const T*>(f.x) + n * f.c;
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r)
    row[r] = static_cast<const T*>(f.weight) + min_of(k + r, k1 - 1) * f.c;
  Vec<A> total[kImages][kRows] = {};
  for (int64_t begin = 0; begin < f.c; begin += kChain * lanes) {
    const int64_t end = min_of(begin + kChain * lanes, f.c);
    Vec<A> acc[kImages][kRows] = {};
    const auto step = [&](auto load_at, int64_t c) __attribute__((always_inline)) {
      Vec<A> w[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) w[r] = load_at(row[r] + c);
#pragma GCC unroll 8
      for (int i = 0; i < kImages; ++i) {
        const Vec<A> v = load_at(x + i * f.c + c);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[i][r] += v * w[r];
      }
    };
    int64_t c = begin;
    for (; c + lanes <= end; c += lanes) step([](const T* p) { return load(p); }, c);
    if (c < end) step([&](const T* p) { return load_part(p, end - c); }, c);
    for (int i = 0; i < kImages; ++i) {
      for (int r = 0; r < kRows; ++r) total[i][r] += acc[i][r];
    }
  }
  const T* const bias = static_cast<const T*>(f.bias);
  T* const y = static_cast<T*>(f.y) + n * f.k;
  with_activation<A>(f.activation, [&](auto activated) {
    for (int i = 0; i < kImages; ++i) {
      for (int r = 0; r < kRows && k + r < k1; ++r) {
        const A v = sum_of_lanes<A>(total[i][r]) + to_acc(bias[k + r]);
        from_acc(activated(v), y + i * f.k + k + r);
      }
    }
  });
}

// The microkernel for `images` images, at most kImages.
template <class T, int kImages = kLinearImages>
FR_INLINE auto linear_tile_of(int64_t images) -> decltype(&linear_tile<T, kLinearRows, 1>) {
  if constexpr (kImages > 1) {
    if (images < kImages) return linear_tile_of<T, kImages - 1>(images);
  }
  return linear_tile<T, kLinearRows, kImages>;
}

// Rows [k0, k1) of the weight, images [n0, n1).
template <class T>
void linear(const LinearForward& f, int64_t k0, int64_t k1, int64_t n0, int64_t n1) {
  const int64_t images = n1 - n0, tiles = ceil_div(images, kLinearImages);
  if (images == 1) {
    for (int64_t k = k0; k < k1; k += kLinearRowsAlone)
      linear_tile<T, kLinearRowsAlone, 1>(f, k, k1, n0);
    return;
  }
  for (int64_t k = k0; k < k1; k += kLinearRows) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = images * t / tiles, end = images * (t + 1) / tiles;
      linear_tile_of<T>(end - first)(f, k, k1, n0 + first);
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
