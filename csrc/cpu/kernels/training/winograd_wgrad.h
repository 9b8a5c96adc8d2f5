// The weight gradient of a training convolution by the adjoint of Winograd's F(4x4, 3x3), stride 1,
// padding 1, channels-last.
//
//   dw = G^T [ sum over tiles of (B^T p(x) B) (A dz A^T) ] G
//
// 36 products for each tile where the direct sum has 144. Per block of tiles both operands are
// transformed to panels, [panel of c][point][tile][width] and [panel of k][point][tile][16]; a pair
// of panels then makes its 36 products of 16 x width, and is transformed back while it is in the
// cache, to a ninth of what 36 points would be. So the 36-point sum, 38 MB at 512 channels, never
// exists.
//
// Order. The panels of dz of 64 output channels stay in the L2 cache (590 KB at 64 tiles) while
// iterating over all panels of x; their rows of dw are contiguous. In the opposite order a pair's
// share of dw is on 72 pages that are visited again for each panel of x: waiting for page-table
// walks took three times as long as the products of a block of 16 tiles.
//
// A pair owns its share of dw and goes through a part's blocks in order; blocks and parts are cut
// by shape: the order of the sum does not depend on threads. Few channels have few pairs, so there
// the tiles are cut into up to 16 parts, which are added in order.
//
// Error: relative 1 to 2e-6 where a direct blocked float32 sum has 2e-7.
#pragma once

#include "winograd_ahead.h"
#include "winograd_windows.h"

namespace fr {
namespace FR_ISA {

constexpr int64_t kPairRows = 16;  // output channels of a pair

// Rows of one register product, beside one or two vectors of input channels.
template <int kVectors>
constexpr int kProductRows = FR_VECTOR_BYTES == 64 ? (kVectors == 1 ? 16 : 8) : 4;

// How the sum is cut. By the shape alone.
struct WgradPlan {
  static constexpr int64_t kRows = 64;  // output channels whose panels stay in the L2 cache
  int64_t part;                         // tiles of a part
  int64_t block;                        // tiles that are transformed at a time

  static WgradPlan of(const ConvShape& s) {
    const int64_t tiles = count_tiles(s);
    const bool few = s.c * s.k <= 128 * 128;
    const int64_t parts = few ? min_of(max_of(tiles / 192, 1), 16) : 1;
    WgradPlan p;
    p.part = max_of(ceil_div(tiles, parts), 1);
    p.block = even_piece(p.part, 64);
    return p;
  }

  int64_t parts(const ConvShape& s) const { return max_of(ceil_div(count_tiles(s), part), 1); }
};

// Where the panels of a block lie, in floats.
struct WgradLayout {
  int64_t x_point, g_point, u_point;  // steps from point to point
  int64_t x_panel, g_panel;           // from panel to panel
  int64_t x, g, u;                    // sizes

  static WgradLayout of(const ConvShape& s, const WgradPlan& p) {
    WgradLayout l;
    l.x_point = odd_lines(p.block * kPanel<float>);
    l.g_point = odd_lines(p.block * kPairRows);
    l.u_point = kPairRows * kPanel<float> + kLineFloats;
    l.x_panel = kTilePoints * l.x_point;
    l.g_panel = kTilePoints * l.g_point;
    l.x = ceil_div(s.c, kPanel<float>) * l.x_panel;
    l.g = min_of(s.k, WgradPlan::kRows) / kPairRows * l.g_panel;
    l.u = kTilePoints * l.u_point;
    return l;
  }
  int64_t floats() const { return x + g + u; }
};

// [kRows x kVectors] of the sum over tiles of a row of kRows floats, kPairRows apart, times
// kVectors vectors. At every step prefetches a line of what the next product reads, and one of the
// stream.
template <int kRows, int kVectors>
void pair_product(const float* rows, const float* cols, int64_t tiles, const float* next,
                  const char* stream, int64_t stream_step, float* to) {
  constexpr int lanes = kLanes<float>;
  Floats acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Floats{};
  }
  for (int64_t t = 0; t < tiles; ++t, rows += kPairRows, cols += kVectors * lanes,
               next += kLineFloats, stream += stream_step) {
    __builtin_prefetch(next);
    __builtin_prefetch(stream, 0, 2);
    Floats w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(cols + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Floats x = broadcast<float>(rows[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] += x * w[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, to += lanes) store(acc[i][v], to);
  }
}

// G^T u G of one pair, set or added to dw, [16][3][3][channels].
inline void transform_pair(const float* u, int64_t u_point, int64_t width, int64_t channels,
                           bool first, float* dw) {
  constexpr int lanes = kLanes<float>;
  for (int64_t k = 0; k < kPairRows; ++k, u += width, dw += 9 * channels) {
    for (int64_t v = 0; v < width; v += lanes) {
      Floats half[3][6];
#pragma GCC unroll 1
      for (int j = 0; j < 6; ++j) {
        Floats column[6], o[3];
        load_line(u + j * u_point + v, 6 * u_point, column);
        transform_weight_gradient(column, o);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) half[i][j] = o[i];
      }
#pragma GCC unroll 1
      for (int i = 0; i < 3; ++i) {
        Floats o[3];
        transform_weight_gradient(half[i], o);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          float* const to = dw + (i * 3 + j) * channels + v;
          store(first ? o[j] : o[j] + load(to), to);
        }
      }
    }
  }
}

// One pair: a panel of x with one of the gradient. next_g: the gradient's panel that is read next.
// Prefetches the lines of dw meanwhile.
template <int kVectors>
void multiply_pair(const WgradLayout& l, const float* x, const float* g, const float* next_g,
                   int64_t tiles, int64_t channels, bool first, TileWalk& walk, float* u,
                   float* dw) {
  constexpr int rows = kProductRows<kVectors>;
  constexpr int64_t width = kVectors * kLanes<float>;
  const float* xp = x;
  float* line = dw;
  for (int64_t p = 0; p < kTilePoints; ++p, xp += l.x_point, g += l.g_point) {
    const bool last = p + 1 == kTilePoints;
    const float *after_g = last ? next_g : g + l.g_point, *after_x = last ? x : xp + l.x_point;
    for (int64_t i = 0; i < kPairRows * 9 / kTilePoints; ++i, line += channels) {
      for (int64_t v = 0; v < width; v += kLineFloats) __builtin_prefetch(line + v, 1);
    }
    for (int64_t r = 0; r < kPairRows; r += rows) {
      const char* const stream = walk.take(tiles);
      pair_product<rows, kVectors>(g + r, xp, tiles, r == 0 ? after_g : after_x,
                                   stream ? stream : reinterpret_cast<const char*>(after_g),
                                   stream ? walk.bytes : 0, u + p * l.u_point + r * width);
    }
  }
  transform_pair(u, l.u_point, width, channels, first, dw);
}

// Tiles [begin, end) of dw's rows [k0, k1), dw: [k][3][3][c]. x_windows(tile0, tile1, layout, to)
// transforms all panels of x, g_windows(tile0, tile1, k0, k1, layout, to) panels of the gradient.
template <class XWindows, class GWindows>
void winograd_wgrad_part(const ConvShape& s, const WgradPlan& plan, int64_t begin, int64_t end,
                         int64_t k0, int64_t k1, const TileStreams& streams, float* scratch,
                         float* dw, const XWindows& x_windows, const GWindows& g_windows) {
  const WgradLayout l = WgradLayout::of(s, plan);
  float* const x = scratch;
  float* const g = x + l.x;
  float* const u = g + l.g;
  for (int64_t t0 = begin; t0 < end; t0 += plan.block) {
    const int64_t t1 = min_of(t0 + plan.block, end), tiles = t1 - t0;
    x_windows(t0, t1, l, x);
    const int64_t pairs = (k1 - k0) / kPairRows * ceil_div(s.c, kPanel<float>);
    TileWalk walk(streams, t1, tiles, pairs * kTilePoints * tiles * 2);
    for (int64_t row = k0; row < k1; row += WgradPlan::kRows) {
      const int64_t row1 = min_of(row + WgradPlan::kRows, k1);
      g_windows(t0, t1, row, row1, l, g);
      for (int64_t c = 0; c < s.c; c += kPanel<float>) {
        const bool wide = min_of(kPanel<float>, s.c - c) == kPanel<float>;
        const auto pair = wide ? multiply_pair<kPanelVectors> : multiply_pair<1>;
        const float* gp = g;
        for (int64_t k = row; k < row1; k += kPairRows, gp += l.g_panel) {
          pair(l, x + c / kPanel<float> * l.x_panel, gp, k + kPairRows < row1 ? gp + l.g_panel : g,
               tiles, s.c, t0 == begin, walk, u, dw + k * 9 * s.c + c);
        }
      }
    }
  }
  if (begin < end) return;
  for (int64_t i = k0 * 9 * s.c; i < k1 * 9 * s.c; ++i) dw[i] = 0;  // no images
}

}  // namespace FR_ISA
}  // namespace fr
