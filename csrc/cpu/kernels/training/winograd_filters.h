// Weights of a training convolution, transformed for Winograd's F(4x4, 3x3): U = G w G^T.
//
// The parameter is read as it is, [k][3][3][c], for both directions. The data gradient makes input
// channels, which are contiguous: a vector of them is one load. The forward makes output channels,
// which are far apart: squares of as many rows as a vector has lanes are transposed in registers
// first (transpose.h), into a buffer that stays in the L1 cache. That costs a third of a transform;
// a transposed copy of the parameter would be written to memory and read again.
//
// A vector's transform is 9 loads, 36 stores and 72 operations, bound by the stores.
#pragma once

#include "../transpose.h"
#include "winograd_windows.h"

namespace fr {
namespace FR_ISA {

// The parameter as a direction reads it: `reduce` are the channels that are summed over, `made`
// those that it makes. Strides in elements; one of the channels' is 1.
template <class T>
struct WinogradFilter {
  const T* data;
  int64_t reduce, made, tap;
  bool turned;  // by 180 degrees

  static WinogradFilter forward(const ConvShape& s, const void* weight) {
    return {static_cast<const T*>(weight), 1, 9 * s.c, s.c, false};
  }
  static WinogradFilter backward(const ConvShape& s, const void* weight) {
    return {static_cast<const T*>(weight), 9 * s.c, 1, s.c, true};
  }
  FR_INLINE int64_t at(int64_t t) const { return (turned ? 8 - t : t) * tap; }
};

// U of the panel that begins at channel k0, for channels [c0, c1): [point][channel][width].
template <class T>
void transform_filters(const WinogradFilter<T>& w, int64_t c0, int64_t c1, int64_t k0,
                       int64_t width, int64_t point, float* to) {
  constexpr int64_t lanes = kLanes<float>;
  if (w.made == 1) {
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t v = 0; v < width; v += lanes, to += lanes) {
        const T* const from = w.data + c * w.reduce + k0 + v;
        const auto tap = [&](int row, int col) { return load(from + w.at(row * 3 + col)); };
        winograd_filters<kTileSide>(tap, point, to);
      }
    }
    return;
  }
  float taps[lanes * 9 * kPanel<float>];  // [channel][tap][width]
  for (int64_t c = c0; c < c1; c += lanes) {
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t v = 0; v < width; v += lanes) {
        const T* const from = w.data + (k0 + v) * w.made + c * w.reduce + w.at(t);
        transpose_square<float>(from, w.made, [&](int64_t i, Floats line) {
          store(line, taps + (i * 9 + t) * width + v);
        });
      }
    }
    for (int64_t i = 0; i < lanes; ++i) {
      for (int64_t v = 0; v < width; v += lanes, to += lanes) {
        const float* const from = taps + i * 9 * width + v;
        const auto tap = [&](int row, int col) { return load(from + (row * 3 + col) * width); };
        winograd_filters<kTileSide>(tap, point, to);
      }
    }
  }
}

// The lines of the parameter that transform_filters reads, piece by piece: a piece is a contiguous
// run of elements of one tap.
template <class T>
struct FilterLines {
  const WinogradFilter<T>& w;
  int64_t c0, depth, k0, width;
  int64_t at = 0;

  // Prefetches the next `count` pieces.
  FR_INLINE void prefetch(int64_t count) {
    const bool dense = w.made == 1;
    const int64_t rows = dense ? depth : width;
    const int64_t bytes = (dense ? width : depth) * static_cast<int64_t>(sizeof(T));
    for (; count > 0 && at < 9 * rows; --count, ++at) {
      const int64_t row = at / 9;
      const T* const piece = w.data + w.at(at % 9) + (c0 + (dense ? row : 0)) * w.reduce +
                             (k0 + (dense ? 0 : row)) * w.made;
      for (int64_t b = 0; b < bytes; b += kLineBytes)
        __builtin_prefetch(reinterpret_cast<const char*>(piece) + b, 0, 2);
    }
  }
};

}  // namespace FR_ISA
}  // namespace fr
