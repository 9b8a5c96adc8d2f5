// The transforms of Winograd's F(4, 3) and F(2, 3) in one dimension, on vectors of channels.
//
//   y = A^T [ (G g) . (B^T d) ]      for m outputs, g of three and d of m + 2
//
// The functions are overloaded on the lengths of their arrays. The points are 0, 1, -1, 2, -2
// and infinity for F(4, 3), and 0, 1, -1 and infinity for F(2, 3).
//
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
#pragma once

#include "vec.h"

namespace fr {
namespace FR_ISA {

using Floats = Vec<float>;

template <int kLength, class T>
FR_INLINE void load_line(const T* from, int64_t step, Floats (&d)[kLength]) {
#pragma GCC unroll 6
  for (int i = 0; i < kLength; ++i) d[i] = load(from + i * step);
}

template <int kLength>
FR_INLINE void store_line(const Floats (&o)[kLength], float* to, int64_t step) {
#pragma GCC unroll 6
  for (int i = 0; i < kLength; ++i) store(o[i], to + i * step);
}

// B^T.
FR_INLINE void transform_input(const Floats (&d)[6], Floats (&o)[6]) {
  o[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  const Floats even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  o[1] = even + odd;
  o[2] = even - odd;
  const Floats far = d[4] - d[2], twice = 2.0f * (d[3] - d[1]);
  o[3] = far + twice;
  o[4] = far - twice;
  o[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

FR_INLINE void transform_input(const Floats (&d)[4], Floats (&o)[4]) {
  o[0] = d[0] - d[2];
  o[1] = d[1] + d[2];
  o[2] = d[2] - d[1];
  o[3] = d[1] - d[3];
}

// G.
FR_INLINE void transform_weight(const Floats (&g)[3], Floats (&o)[6]) {
  const Floats ends = g[0] + g[2], far = g[0] + 4.0f * g[2];
  o[0] = (1.0f / 4) * g[0];
  o[1] = (-1.0f / 6) * (ends + g[1]);
  o[2] = (-1.0f / 6) * (ends - g[1]);
  o[3] = (1.0f / 24) * (far + 2.0f * g[1]);
  o[4] = (1.0f / 24) * (far - 2.0f * g[1]);
  o[5] = g[2];
}

FR_INLINE void transform_weight(const Floats (&g)[3], Floats (&o)[4]) {
  const Floats half = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
  o[0] = g[0];
  o[1] = half + middle;
  o[2] = half - middle;
  o[3] = g[2];
}

// A^T.
FR_INLINE void transform_output(const Floats (&m)[6], Floats (&o)[4]) {
  const Floats s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  o[0] = m[0] + s1 + s2;
  o[1] = d1 + 2.0f * d2;
  o[2] = s1 + 4.0f * s2;
  o[3] = d1 + 8.0f * d2 + m[5];
}

FR_INLINE void transform_output(const Floats (&m)[4], Floats (&o)[2]) {
  o[0] = m[0] + m[1] + m[2];
  o[1] = m[1] - m[2] - m[3];
}

}  // namespace FR_ISA
}  // namespace fr
