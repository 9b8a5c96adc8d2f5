// Convolution by Winograd's F(4x4, 3x3), float32, channels-last, stride 1, with the same epilogue.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A     for each 4x4 tile of the output, 6x6 of the input
//
// 36 multiplications make 16 outputs where the direct sum takes 144. The products over channels are
// 36 matrix products of [tiles x C] by [C x panel], with as many accumulators as the direct kernel.
//
// The weight comes packed as the direct kernel reads it, [panel][r][s][c][panel]: its transform is
// vectorised over output channels and made anew in every block of tiles, for a panel and
// kWinogradDepth channels at a time, so that it stays in the L2 cache. That reads a quarter of what
// transformed weights would be, and needs no memory for them. Bytes: x, w, y and the residual; the
// transformed input is 2.25 times the input and is read once for each panel.
//
// Error: the transforms' coefficients, up to 8, cost about two bits against the direct sum:
// relative 1e-6 where that has 3e-7. A value that is not finite spreads over its whole tile.
//
// Source: Winograd, 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015.
#pragma once

#include "conv_bn_add_relu.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

using Floats = Vec<float>;

// Input channels whose weights are transformed at a time: 36 points of 128 x 32 floats are 590 KB.
// Longer would not fit; each pass adds to the products of the one before, which costs 2%.
constexpr int64_t kWinogradDepth = 128;

// B^T of six.
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

// G of three.
FR_INLINE void transform_weight(const Floats (&g)[3], Floats (&o)[6]) {
  const Floats ends = g[0] + g[2], far = g[0] + 4.0f * g[2];
  o[0] = (1.0f / 4) * g[0];
  o[1] = (-1.0f / 6) * (ends + g[1]);
  o[2] = (-1.0f / 6) * (ends - g[1]);
  o[3] = (1.0f / 24) * (far + 2.0f * g[1]);
  o[4] = (1.0f / 24) * (far - 2.0f * g[1]);
  o[5] = g[2];
}

// A^T of six.
FR_INLINE void transform_output(const Floats (&m)[6], Floats (&o)[4]) {
  const Floats s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  o[0] = m[0] + s1 + s2;
  o[1] = d1 + 2.0f * d2;
  o[2] = s1 + 4.0f * s2;
  o[3] = d1 + 8.0f * d2 + m[5];
}

// The place of a tile: its image and its first output pixel.
struct TilePlace {
  int64_t n, y, x;
};

FR_INLINE TilePlace place_of(const ConvShape& s, int64_t tile) {
  const int64_t across = ceil_div(s.out_w(), kWinogradTile);
  const int64_t down = ceil_div(s.out_h(), kWinogradTile);
  return {tile / (across * down), tile / across % down * kWinogradTile,
          tile % across * kWinogradTile};
}

// Where a block's scratch has what, in floats: [point][chunk][tile][channel of kWinogradDepth],
// [point][channel][panel] and [point][tile][panel]. What one product reads lies in one piece, which
// the processor fetches ahead.
//
// A transform walks through all points at once. Lest they meet in a few sets of the L1 cache (64
// tiles of 16 channels would in two, and take twice as long), points are an odd number of lines
// apart; and tiles, which a product reads many of, a vector beyond what could be a power of two.
struct WinogradScratch {
  int64_t tile, chunk;                               // steps of the input within a point
  int64_t input_point, weight_point, product_point;  // from point to point of each
  int64_t input, weight, product;                    // sizes
};

// Transformed input of one tile, whose first pixel is (y0, x0). kInside: none of its pixels is
// padding.
template <bool kInside>
void winograd_input_tile(const ConvShape& s, const float* image, int64_t y0, int64_t x0,
                         const WinogradScratch& l, float* tile) {
  for (int64_t c = 0; c < s.c; c += kLanes<float>) {
    float* to = tile + c / kWinogradDepth * l.chunk + c % kWinogradDepth;
    Floats rows[6][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Floats column[6], o[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        const bool inside = kInside || (y0 + i >= 0 && y0 + i < s.h && x0 + j >= 0 && x0 + j < s.w);
        column[i] = inside ? load(image + ((y0 + i) * s.w + x0 + j) * s.c + c) : Floats{};
      }
      transform_input(column, o);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) rows[i][j] = o[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Floats o[6];
      transform_input(rows[i], o);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(o[j], to + (i * 6 + j) * l.input_point);
    }
  }
}

// Transformed input of tiles [tile0, tile1).
inline void winograd_input(const ConvShape& s, const float* x, int64_t tile0, int64_t tile1,
                           const WinogradScratch& l, float* to) {
  for (int64_t tile = tile0; tile < tile1; ++tile, to += l.tile) {
    const TilePlace place = place_of(s, tile);
    const int64_t y0 = place.y - s.pad_h, x0 = place.x - s.pad_w;
    const bool inside = y0 >= 0 && y0 + 6 <= s.h && x0 >= 0 && x0 + 6 <= s.w;
    const auto transform = inside ? winograd_input_tile<true> : winograd_input_tile<false>;
    transform(s, x + place.n * s.h * s.w * s.c, y0, x0, l, to);
  }
}

// G g G^T of a panel's filters for channels [c0, c1), from the packed weight
// [r][s][channel][panel].
inline void winograd_weight(const ConvShape& s, const float* packed, int64_t panel, int64_t c0,
                            int64_t c1, const WinogradScratch& l, float* to) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < (c1 - c0) * panel; i += lanes) {
    Floats half[3][6];
    for (int tap = 0; tap < 3; ++tap) {
      Floats g[3];
      for (int r = 0; r < 3; ++r) g[r] = load(packed + ((r * 3 + tap) * s.c + c0) * panel + i);
      transform_weight(g, half[tap]);
    }
    for (int row = 0; row < 6; ++row) {
      const Floats g[3] = {half[0][row], half[1][row], half[2][row]};
      Floats o[6];
      transform_weight(g, o);
      for (int j = 0; j < 6; ++j) store(o[j], to + (row * 6 + j) * l.weight_point + i);
    }
  }
}

// [tiles][panel] at `to`, set or added to, by [tiles][depth], a row every `stride`, times
// [depth][panel].
template <int kTile, int kVectors>
void winograd_product(const float* a, int64_t stride, int64_t depth, const float* b, bool first,
                      float* to) {
  constexpr int lanes = kLanes<float>;
  Floats acc[kTile][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Floats{};
  }
  for (int64_t c = 0; c < depth; ++c, ++a, b += kVectors * lanes) {
    Floats w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(b + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const Floats x = broadcast<float>(a[i * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] += x * w[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, to += lanes)
      store(first ? acc[i][v] : acc[i][v] + load(to), to);
  }
}

using WinogradProduct = void (*)(const float*, int64_t, int64_t, const float*, bool, float*);

template <int kVectors>
WinogradProduct product_of(int64_t rows) {
  static const WinogradProduct products[] = {
      winograd_product<1, kVectors>,  winograd_product<2, kVectors>,
      winograd_product<3, kVectors>,  winograd_product<4, kVectors>,
      winograd_product<5, kVectors>,  winograd_product<6, kVectors>,
#if FR_VECTOR_BYTES == 64
      winograd_product<7, kVectors>,  winograd_product<8, kVectors>,
      winograd_product<9, kVectors>,  winograd_product<10, kVectors>,
      winograd_product<11, kVectors>, winograd_product<12, kVectors>,
      winograd_product<13, kVectors>, winograd_product<14, kVectors>,
#endif
  };
  return products[rows - 1];
}

// Output of tiles [tile0, tile1) for the panel that begins at channel k.
inline void winograd_output(const ConvForward& f, int64_t tile0, int64_t tile1, int64_t k,
                            int64_t panel, const WinogradScratch& l, const float* from) {
  constexpr int lanes = kLanes<float>;
  const ConvShape& s = f.shape;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const float* residual = static_cast<const float*>(f.residual);
  float* y = static_cast<float*>(f.y);
  for (int64_t tile = tile0; tile < tile1; ++tile, from += panel) {
    const TilePlace place = place_of(s, tile);
    const int64_t rows = min_of(kWinogradTile, out_h - place.y);
    const int64_t cols = min_of(kWinogradTile, out_w - place.x);
    for (int64_t v = 0; v < panel; v += lanes) {
      Floats half[4][6];
      for (int j = 0; j < 6; ++j) {
        Floats column[6], o[4];
        for (int i = 0; i < 6; ++i) column[i] = load(from + (i * 6 + j) * l.product_point + v);
        transform_output(column, o);
        for (int i = 0; i < 4; ++i) half[i][j] = o[i];
      }
      const Floats scale = load(static_cast<const float*>(f.scale) + k + v);
      const Floats shift = load(static_cast<const float*>(f.shift) + k + v);
      for (int64_t i = 0; i < rows; ++i) {
        Floats o[4];
        transform_output(half[i], o);
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t at = ((place.n * out_h + place.y + i) * out_w + place.x + j) * s.k + k + v;
          Floats r = o[j] * scale + shift;
          if (residual) r += load(residual + at);
          store(f.relu ? relu_vector(r) : r, y + at);
        }
      }
    }
  }
}

inline WinogradScratch winograd_scratch(const ConvShape& s, int64_t tiles) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const auto apart = [](int64_t floats) { return (ceil_div(floats, kLine) | 1) * kLine; };
  WinogradScratch l;
  l.tile = min_of(s.c, kWinogradDepth) + kLanes<float>;
  l.chunk = tiles * l.tile;
  l.input_point = apart(ceil_div(s.c, kWinogradDepth) * l.chunk);
  l.weight_point = apart(min_of(s.c, kWinogradDepth) * kPanel<float>);
  l.product_point = apart(tiles * kPanel<float>);
  l.input = kWinogradPoints * l.input_point;
  l.weight = kWinogradPoints * l.weight_point;
  l.product = kWinogradPoints * l.product_point;
  return l;
}

inline int64_t winograd_scratch_bytes(const ConvShape& s, int64_t tiles) {
  const WinogradScratch l = winograd_scratch(s, tiles);
  return (l.input + l.weight + l.product) * static_cast<int64_t>(sizeof(float));
}

// Input and output channels are multiples of the vector.
inline void winograd(const ConvForward& f, const WinogradBlock& b, void* scratch) {
  const ConvShape& s = f.shape;
  const int64_t tiles = b.tile1 - b.tile0, parts = ceil_div(tiles, kMaxTile);
  const WinogradScratch l = winograd_scratch(s, tiles);
  float* input = static_cast<float*>(scratch);
  float* weight = input + l.input;
  float* product = weight + l.weight;
  winograd_input(s, static_cast<const float*>(f.x), b.tile0, b.tile1, l, input);
  for (int64_t q = b.panel0; q < b.panel1; ++q) {
    const int64_t panel = panel_width<float>(s, q * kPanel<float>);
    const float* packed = static_cast<const float*>(f.packed) + panel_offset<float>(s, q);
    const auto products = panel == kPanel<float> ? product_of<kPanelVectors> : product_of<1>;
    for (int64_t c0 = 0; c0 < s.c; c0 += kWinogradDepth) {
      const int64_t c1 = min_of(c0 + kWinogradDepth, s.c);
      const float* chunk = input + c0 / kWinogradDepth * l.chunk;
      winograd_weight(s, packed, panel, c0, c1, l, weight);
      for (int64_t point = 0; point < kWinogradPoints; ++point) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t t0 = tiles * part / parts, t1 = tiles * (part + 1) / parts;
          products(t1 - t0)(chunk + point * l.input_point + t0 * l.tile, l.tile, c1 - c0,
                            weight + point * l.weight_point, c0 == 0,
                            product + point * l.product_point + t0 * panel);
        }
      }
    }
    winograd_output(f, b.tile0, b.tile1, q * kPanel<float>, panel, l, product);
  }
}

}  // namespace FR_ISA
}  // namespace fr
