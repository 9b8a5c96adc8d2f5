// The input of conv_bn_add_relu.h's microkernels: where the pixels of a block are read, in place or
// from a copy in scratch, and how the copy is made.
#pragma once

#include "panels.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

// The elements of a sum, as offsets from an output pixel's first input element.
struct Runs {
  int64_t rows, per_row;
  int64_t length;  // elements side by side
  int64_t row_step, col_step;
};

// A block of input: the pixel under output (n, oy, ox), counted from the block's origin, begins at
// base + n * image + oy * row + ox * pixel.
struct Source {
  int64_t image, row, pixel;
  Runs runs;
};

// How the input of a block is read: see the comment at the head of conv_bn_add_relu.h.
enum Reading { kInPlace, kPixels, kRows };

template <class T>
Reading reading_of(const ConvShape& s) {
  constexpr int64_t kPage = 4096;
  if (s.pad_h != 0 || s.pad_w != 0) return kRows;
  if (s.kh == 1 && s.kw == 1) {
    const bool aliased = s.stride_w * s.c * static_cast<int64_t>(sizeof(T)) % kPage == 0;
    return sizeof(T) != sizeof(Acc<T>) || aliased ? kPixels : kInPlace;
  }
  return sizeof(T) == sizeof(Acc<T>) ? kInPlace : kRows;
}

// Elements from one copied pixel to the next: a vector more than the channels, whose number may be
// a power of two.
template <class A>
FR_INLINE int64_t pixel_step(const ConvShape& s) {
  return s.c + kLanes<A>;
}

inline Runs runs_of(const ConvShape& s, int64_t row_stride) {
  const bool adjacent = s.dilation_w == 1 && s.groups == 1;
  Runs runs;
  runs.per_row = adjacent ? 1 : s.kw;
  runs.rows = s.kh;
  runs.length = adjacent ? s.kw * s.c : s.group_c();
  runs.row_step = s.dilation_h * row_stride;
  runs.col_step = s.dilation_w * s.c;
  return runs;
}

// Input rows and columns under a block of output.
inline int64_t block_rows(const ConvShape& s, const ConvBlock& b) {
  return (b.row1 - b.row0 - 1) * s.stride_h + (s.kh - 1) * s.dilation_h + 1;
}
inline int64_t block_cols(const ConvShape& s, const ConvBlock& b) {
  return (b.col1 - b.col0 - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
}

// The pixels of a tile: pixel i begins at base + offset[i] where six pointers fit the registers, so
// that a tile may continue in the next row; else at base + i * step.
constexpr bool kIndirect = FR_VECTOR_BYTES < 64;
template <class A>
struct Pixels {
  const A* base;
  int64_t step;
  const int64_t* offset;
};

// Bytes of the list of pixels at the head of a block's scratch, before the copy of the input.
inline int64_t list_bytes(const ConvBlock& b) {
  const int64_t pixels = (b.n1 - b.n0) * (b.row1 - b.row0) * (b.col1 - b.col0);
  const int64_t bytes = pixels * static_cast<int64_t>(sizeof(int64_t));
  return kIndirect ? ceil_div(bytes, kLineBytes) * kLineBytes : 0;
}

// Lists the offset of each output pixel's input, in the order of the result.
inline void list_pixels(const ConvBlock& b, const Source& source, int64_t* to) {
  for (int64_t n = 0; n < b.n1 - b.n0; ++n) {
    for (int64_t oy = 0; oy < b.row1 - b.row0; ++oy) {
      const int64_t row = n * source.image + oy * source.row;
      for (int64_t ox = 0; ox < b.col1 - b.col0; ++ox) *to++ = row + ox * source.pixel;
    }
  }
}

template <class T>
int64_t conv_scratch_bytes(const ConvShape& s, const ConvBlock& b) {
  using A = Acc<T>;
  const Reading reading = reading_of<T>(s);
  if (reading == kInPlace) return list_bytes(b);
  const int64_t elements = reading == kPixels
                               ? (b.row1 - b.row0) * (b.col1 - b.col0) * pixel_step<A>(s)
                               : block_rows(s, b) * block_cols(s, b) * s.c;
  return list_bytes(b) + (b.n1 - b.n0) * elements * static_cast<int64_t>(sizeof(A));
}

template <class T>
void copy_widened(const T* from, int64_t count, Acc<T>* to) {
  constexpr int lanes = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(load(from + i), to + i);
  for (; i < count; ++i) to[i] = to_acc(from[i]);
}

template <class A>
void fill_zero(A* to, int64_t count) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(Vec<A>{}, to + i);
  for (; i < count; ++i) to[i] = 0;
}

// Copies the input under the block into scratch, with zeros for the padding.
template <class T>
void gather_block(const ConvShape& s, const ConvBlock& b, const T* x, Acc<T>* scratch) {
  const int64_t rows = block_rows(s, b), cols = block_cols(s, b);
  const int64_t y0 = b.row0 * s.stride_h - s.pad_h, x0 = b.col0 * s.stride_w - s.pad_w;
  const int64_t left = min_of(max_of(-x0, 0), cols);
  const int64_t right = max_of(min_of(s.w - x0, cols), left);
  for (int64_t n = b.n0; n < b.n1; ++n) {
    for (int64_t i = 0; i < rows; ++i, scratch += cols * s.c) {
      const int64_t y = y0 + i;
      if (y < 0 || y >= s.h) {
        fill_zero(scratch, cols * s.c);
        continue;
      }
      fill_zero(scratch, left * s.c);
      copy_widened(x + ((n * s.h + y) * s.w + x0 + left) * s.c, (right - left) * s.c,
                   scratch + left * s.c);
      fill_zero(scratch + right * s.c, (cols - right) * s.c);
    }
  }
}

// Copies the pixels that a 1x1 convolution without padding uses, in the order of its output.
template <class T>
void gather_pixels(const ConvShape& s, const ConvBlock& b, const T* x, Acc<T>* scratch) {
  for (int64_t n = b.n0; n < b.n1; ++n) {
    for (int64_t oy = b.row0; oy < b.row1; ++oy) {
      const T* row = x + (n * s.h + oy * s.stride_h) * s.w * s.c;
      for (int64_t ox = b.col0; ox < b.col1; ++ox, scratch += pixel_step<Acc<T>>(s)) {
        copy_widened(row + ox * s.stride_w * s.c, s.c, scratch);
      }
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
