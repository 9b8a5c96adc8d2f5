// The windows of a training convolution by Winograd's F(4x4, 3x3): the transforms from a map's
// pixels to the 36 points of its tiles, and back.
//
//   input        B^T x B          6 x 6 pixels to 36 points, the padding's zeros included
//   gradient     A dz A^T         4 x 4 pixels to 36 points: the output transform's adjoint
//   output       A^T m A          36 points to 4 x 4 pixels, through an epilogue
//
// A window is transformed for a vector of channels at a time: in channels-last memory that is one
// load for each pixel. A prologue (fusion.h) makes each pixel's vector while it is loaded, so that
// the normalised map, or batch norm's gradient, is never stored. The padding's zeros are inserted
// after the prologue.
//
// Cost of an input window: 36 loads, 36 stores and 12 lines of 12 operations. 36 vectors do not fit
// in 32 registers, so the lines of the first axis are buffered in the L1 cache. Points are an odd
// number of cache lines apart: if they were a power of two apart, the stores of a window would map
// to a few sets of the cache.
//
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; the adjoint
// follows by transposing each step.
#pragma once

#include "../winograd.h"
#include "fusion.h"

namespace fr {
namespace FR_ISA {

constexpr int kTileSide = 4, kWindowSide = 6, kTilePoints = 36;

using Tile = TilePlace<kTileSide>;

// An odd number of cache lines, in floats.
FR_INLINE int64_t odd_lines(int64_t floats) {
  return (ceil_div(floats, kLineFloats) | 1) * kLineFloats;
}

FR_INLINE int64_t count_tiles(const ConvShape& s) {
  return s.n * ceil_div(s.h, kTileSide) * ceil_div(s.w, kTileSide);
}

// `count` tiles in pieces of nearly equal size, of at most `most`.
FR_INLINE int64_t even_piece(int64_t count, int64_t most) {
  return count == 0 ? 1 : ceil_div(count, ceil_div(count, most));
}

// Pixels of tiles [tile0, tile1); at the lower and right edges a tile has fewer than 16.
FR_INLINE int64_t count_pixels(const ConvShape& s, int64_t tile0, int64_t tile1) {
  int64_t pixels = 0;
  Tile place = Tile::of(s, tile0);
  for (int64_t tile = tile0; tile < tile1; ++tile, place.advance(s.h, s.w))
    pixels += min_of(kTileSide, s.h - place.y) * min_of(kTileSide, s.w - place.x);
  return pixels;
}

// A.
FR_INLINE void transform_gradient(const Floats (&y)[4], Floats (&o)[6]) {
  const Floats even = y[0] + y[2], odd = y[1] + y[3];
  const Floats far = y[0] + 4.0f * y[2], wide = 2.0f * y[1] + 8.0f * y[3];
  o[0] = y[0];
  o[1] = even + odd;
  o[2] = even - odd;
  o[3] = far + wide;
  o[4] = far - wide;
  o[5] = y[3];
}

// G^T.
FR_INLINE void transform_weight_gradient(const Floats (&u)[6], Floats (&o)[3]) {
  const Floats s1 = u[1] + u[2], d1 = u[2] - u[1], s2 = u[3] + u[4], d2 = u[3] - u[4];
  o[0] = (1.0f / 4) * u[0] - (1.0f / 6) * s1 + (1.0f / 24) * s2;
  o[1] = (1.0f / 6) * d1 + (1.0f / 12) * d2;
  o[2] = (1.0f / 6) * (s2 - s1) + u[5];
}

// The transform of a window: its side in pixels, how far before its tile it begins, and the
// transform of one line.
struct InputTransform {
  static constexpr int kSide = kWindowSide, kBefore = 1;
  static FR_INLINE void line(const Floats (&d)[6], Floats (&o)[6]) { transform_input(d, o); }
};
struct GradientTransform {
  static constexpr int kSide = kTileSide, kBefore = 0;
  static FR_INLINE void line(const Floats (&d)[4], Floats (&o)[6]) { transform_gradient(d, o); }
};

// Windows of tiles [tile0, tile1) of a map [n][h][w][channels], for channels [c0, c1), through a
// prologue. The points of channel c of the i-th tile are at to(c) + i * tile_step, `point` apart.
template <class Transform, class P, class To>
void transform_windows(const P& in, const ConvShape& s, int64_t channels, int64_t c0, int64_t c1,
                       int64_t tile0, int64_t tile1, int64_t tile_step, int64_t point, To to) {
  constexpr int side = Transform::kSide, lanes = kLanes<float>;
  const int64_t row = s.w * channels;
  Tile place = Tile::of(s, tile0);
  for (int64_t tile = tile0; tile < tile1; ++tile, place.advance(s.h, s.w)) {
    const int64_t y0 = place.y - Transform::kBefore, x0 = place.x - Transform::kBefore;
    const int64_t row0 = max_of(-y0, 0), row1 = min_of(s.h - y0, side);
    const int64_t col0 = max_of(-x0, 0), col1 = min_of(s.w - x0, side);
    const bool whole = row1 - row0 == side && col1 - col0 == side;
    const int64_t first = (place.n * s.h + y0) * row + x0 * channels;
    for (int64_t c = c0; c < c1; c += lanes) {
      const typename P::Channel channel = in.channel(c);
      float* const points = to(c) + (tile - tile0) * tile_step;
      float half[6][side * lanes];
#pragma GCC unroll 1
      for (int j = 0; j < side; ++j) {
        const int64_t at = first + j * channels + c;
        Floats d[side], o[6];
        if (whole) {
#pragma GCC unroll 6
          for (int i = 0; i < side; ++i) d[i] = in.get(at + i * row, channel);
          if (j >= side - kTileSide) {  // what the next tile reads first
#pragma GCC unroll 6
            for (int i = 0; i < side; ++i) in.prefetch(at + i * row + kTileSide * channels);
          }
        } else {
          const bool inside = j >= col0 && j < col1;
#pragma GCC unroll 6
          for (int i = 0; i < side; ++i) {
            d[i] = Floats{};
            if (inside && i >= row0 && i < row1) d[i] = in.get(at + i * row, channel);
          }
        }
        Transform::line(d, o);
        store_line(o, half[0] + j * lanes, side * lanes);
      }
#pragma GCC unroll 1
      for (int i = 0; i < 6; ++i) {
        Floats d[side], o[6];
        load_line(half[i], lanes, d);
        Transform::line(d, o);
        store_line(o, points + i * 6 * point, point);
      }
    }
  }
}

// Tiles [tile0, tile1) of the result [n][h][w][k], for channels [k0, k0 + width), from points at
// `from`, [point][tile][width], through an epilogue. An epilogue's sums are closed at every tile: a
// chain of float32 additions is 16 pixels and as many tiles as there are, not all pixels. first: a
// block of sums begins here.
template <class E>
void transform_results(const E& e, const ConvShape& s, int64_t k0, int64_t width, int64_t tile0,
                       int64_t tile1, int64_t point, bool first, const float* from) {
  constexpr int lanes = kLanes<float>, in = kWindowSide, out = kTileSide;
  Tile place = Tile::of(s, tile0);
  for (int64_t tile = tile0; tile < tile1; ++tile, from += width, place.advance(s.h, s.w)) {
    const int64_t rows = min_of(out, s.h - place.y), cols = min_of(out, s.w - place.x);
    const int64_t pixel = (place.n * s.h + place.y) * s.w + place.x;
    for (int64_t v = 0; v < width; v += lanes) {
      const int64_t k = k0 + v, at = pixel * s.k + k;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) e.prefetch(at + (i * s.w + j) * s.k);
      }
      Floats half[out][in];
#pragma GCC unroll 1
      for (int j = 0; j < in; ++j) {
        Floats column[in], o[out];
        load_line(from + j * point + v, in * point, column);
        transform_output(column, o);
#pragma GCC unroll 4
        for (int i = 0; i < out; ++i) half[i][j] = o[i];
      }
      typename E::Channel channel = e.channel(k);
      if (first && tile == tile0) {  // the tile's mean: any one pixel may be far from the map's
        Floats sum{};
        for (int64_t i = 0; i < rows; ++i) {
          Floats o[out];
          transform_output(half[i], o);
          for (int64_t j = 0; j < cols; ++j) sum += o[j];
        }
        e.pivot(sum * (1.0f / static_cast<float>(rows * cols)), channel);
      }
      for (int64_t i = 0; i < rows; ++i) {
        Floats o[out];
        transform_output(half[i], o);
        const int64_t line = at + i * s.w * s.k;
        if (cols == out) {
#pragma GCC unroll 4
          for (int j = 0; j < out; ++j) e.put(o[j], line + j * s.k, channel);
        } else {
          for (int64_t j = 0; j < cols; ++j) e.put(o[j], line + j * s.k, channel);
        }
      }
      e.done(channel, k);
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
