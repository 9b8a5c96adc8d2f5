// The positions of a direct convolution's pixels: those that one product computes, and the pixel of
// the operand that each tap reads.
//
// The forward computes all pixels of z in order. The data gradient of stride s computes its pixels
// in s * s classes by their row and column modulo s: only the taps that reach a class contribute to
// it, and within a class the operand is read with stride 1. So no product includes the zeros that
// the stride would insert.
#pragma once

#include "../vec.h"
#include "table.h"

namespace fr {
namespace FR_ISA {

// One of the two axes.
struct Axis {
  int64_t count;           // of pixels that are made
  int64_t first, step;     // pixel i is the map's first + i * step
  int64_t size;            // of the operand
  int64_t taps;            // that reach these pixels
  int64_t tap0, tap_step;  // tap t is the kernel's tap0 + t * tap_step
  int64_t move;            // pixel i reads the operand's i * move + offset + t * tap_move
  int64_t offset, tap_move;

  FR_INLINE int64_t source(int64_t i, int64_t t) const { return i * move + offset + t * tap_move; }
};

FR_INLINE Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                            int64_t dilation) {
  return {out, 0, 1, in, kernel, 0, 1, stride, -pad, dilation};
}

// Of the pixels r, r + stride, .. of the input; a stride above 1 comes with dilation 1.
FR_INLINE Axis gradient_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                             int64_t dilation, int64_t r) {
  const int64_t tap0 = (r + pad) % stride;
  const int64_t taps = tap0 < kernel ? ceil_div(kernel - tap0, stride) : 0;
  return {r < in ? ceil_div(in - r, stride) : 0,
          r,
          stride,
          out,
          taps,
          tap0,
          stride,
          1,
          (r + pad - tap0 * dilation) / stride,
          stride > 1 ? -1 : -dilation};
}

struct Grid {
  int64_t images;
  Axis y, x;
  int64_t map_h, map_w;  // of the map that is made

  FR_INLINE int64_t pixels() const { return images * y.count * x.count; }
  FR_INLINE int64_t taps() const { return y.taps * x.taps; }

  // Calls visit(i, image, row, column) for the pixels p0 + i of the grid.
  template <class Visit>
  FR_INLINE void for_pixels(int64_t p0, int64_t count, Visit visit) const {
    int64_t column = p0 % x.count, row = p0 / x.count % y.count, image = p0 / (x.count * y.count);
    for (int64_t i = 0; i < count; ++i) {
      visit(i, image, row, column);
      if (++column < x.count) continue;
      column = 0;
      if (++row < y.count) continue;
      row = 0;
      ++image;
    }
  }

  // The pixels' numbers in the map that is made.
  FR_INLINE void places(int64_t p0, int64_t count, int64_t* to) const {
    for_pixels(p0, count, [&](int64_t i, int64_t image, int64_t row, int64_t column) {
      to[i] = (image * map_h + y.first + row * y.step) * map_w + x.first + column * x.step;
    });
  }

  // The numbers of the operand's pixels under tap (ty, tx), -1 where it is padding.
  FR_INLINE void sources(int64_t ty, int64_t tx, int64_t p0, int64_t count, int64_t* to) const {
    for_pixels(p0, count, [&](int64_t i, int64_t image, int64_t row, int64_t column) {
      const int64_t from_y = y.source(row, ty), from_x = x.source(column, tx);
      const bool inside = from_y >= 0 && from_y < y.size && from_x >= 0 && from_x < x.size;
      to[i] = inside ? (image * y.size + from_y) * x.size + from_x : -1;
    });
  }
};

FR_INLINE Grid forward_grid(const ConvShape& s) {
  return {s.n, forward_axis(s.h, s.out_h(), s.kh, s.stride_h, s.pad_h, s.dilation_h),
          forward_axis(s.w, s.out_w(), s.kw, s.stride_w, s.pad_w, s.dilation_w), s.out_h(),
          s.out_w()};
}

FR_INLINE int64_t gradient_classes(const ConvShape& s) { return s.stride_h * s.stride_w; }

FR_INLINE Grid gradient_grid(const ConvShape& s, int64_t c) {
  return {s.n,
          gradient_axis(s.h, s.out_h(), s.kh, s.stride_h, s.pad_h, s.dilation_h, c / s.stride_w),
          gradient_axis(s.w, s.out_w(), s.kw, s.stride_w, s.pad_w, s.dilation_w, c % s.stride_w),
          s.h, s.w};
}

}  // namespace FR_ISA
}  // namespace fr
