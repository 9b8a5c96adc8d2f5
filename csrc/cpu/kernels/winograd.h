// Convolution by Winograd's F(4x4, 3x3), float32, channels-last, stride 1, with the same epilogue.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A     for each 4x4 tile of the output, 6x6 of the input
//
// 36 multiplications make 16 outputs where the direct sum takes 144. The products over channels are
// 36 matrix products of [tiles x C] by [C x panel], done by the direct kernel's microkernel. Bytes:
// the transformed input is 2.25 times the input and lives in the L2 cache for a block of tiles,
// which sets the block's size; the transformed weight is 4 times the weight and is read once for
// each block.
//
// Error: the transforms' coefficients, up to 8, cost about two bits against the direct sum:
// relative 1e-6 where that has 3e-7. A value that is not finite spreads over its whole tile.
//
// Source: Winograd, 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015.
//
// The weight is transformed in float64 and laid out [panel][point][channel][panel].
#pragma once

#include "conv_bn_add_relu.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

using Floats = Vec<float>;

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

// Transformed input of tiles [tile0, tile1): [point][tile][channel].
inline void winograd_input(const ConvShape& s, const float* x, int64_t tile0, int64_t tile1,
                           float* to) {
  constexpr int lanes = kLanes<float>;
  const int64_t tiles = tile1 - tile0;
  for (int64_t t = 0; t < tiles; ++t) {
    const TilePlace place = place_of(s, tile0 + t);
    const int64_t y0 = place.y - s.pad_h, x0 = place.x - s.pad_w;
    const float* image = x + place.n * s.h * s.w * s.c;
    for (int64_t c = 0; c < s.c; c += lanes) {
      Floats rows[6][6];
      for (int j = 0; j < 6; ++j) {
        Floats column[6], o[6];
        for (int i = 0; i < 6; ++i) {
          const int64_t yy = y0 + i, xx = x0 + j;
          const bool inside = yy >= 0 && yy < s.h && xx >= 0 && xx < s.w;
          column[i] = inside ? load(image + (yy * s.w + xx) * s.c + c) : Floats{};
        }
        transform_input(column, o);
        for (int i = 0; i < 6; ++i) rows[i][j] = o[i];
      }
      for (int i = 0; i < 6; ++i) {
        Floats o[6];
        transform_input(rows[i], o);
        for (int j = 0; j < 6; ++j) store(o[j], to + ((i * 6 + j) * tiles + t) * s.c + c);
      }
    }
  }
}

template <int kTile>
void winograd_product(const float* a, int64_t depth, const float* b, float* to) {
  Floats acc[kTile][kPanelVectors] = {};
  accumulate<float, kTile>(a, depth, Runs{1, 1, depth, 0, 0}, b, acc);
  __builtin_memcpy(to, acc, sizeof acc);
}

using WinogradProduct = void (*)(const float*, int64_t, const float*, float*);

inline WinogradProduct product_of(int64_t rows) {
  static const WinogradProduct products[] = {
      winograd_product<1>,  winograd_product<2>,  winograd_product<3>,  winograd_product<4>,
      winograd_product<5>,  winograd_product<6>,
#if FR_VECTOR_BYTES == 64
      winograd_product<7>,  winograd_product<8>,  winograd_product<9>,  winograd_product<10>,
      winograd_product<11>, winograd_product<12>, winograd_product<13>, winograd_product<14>,
#endif
  };
  return products[rows - 1];
}

// Output of tiles [tile0, tile1) for the panel that begins at channel k, from [point][tile][panel].
inline void winograd_output(const ConvForward& f, int64_t tile0, int64_t tile1, int64_t k,
                            const float* from) {
  constexpr int lanes = kLanes<float>, panel = kPanel<float>;
  const ConvShape& s = f.shape;
  const int64_t tiles = tile1 - tile0, out_h = s.out_h(), out_w = s.out_w();
  const float* residual = static_cast<const float*>(f.residual);
  float* y = static_cast<float*>(f.y);
  for (int64_t t = 0; t < tiles; ++t) {
    const TilePlace place = place_of(s, tile0 + t);
    const int64_t rows = min_of(kWinogradTile, out_h - place.y);
    const int64_t cols = min_of(kWinogradTile, out_w - place.x);
    for (int64_t v = 0; v < panel; v += lanes) {
      Floats half[4][6];
      for (int j = 0; j < 6; ++j) {
        Floats column[6], o[4];
        for (int i = 0; i < 6; ++i) column[i] = load(from + ((i * 6 + j) * tiles + t) * panel + v);
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

inline int64_t winograd_scratch_bytes(const ConvShape& s, int64_t tiles) {
  return kWinogradPoints * tiles * (s.c + kPanel<float>)*static_cast<int64_t>(sizeof(float));
}

// f.packed is the transformed weight; channels are multiples of the vector and of the panel.
inline void winograd(const ConvForward& f, const WinogradBlock& b, void* scratch) {
  const ConvShape& s = f.shape;
  const int64_t tiles = b.tile1 - b.tile0;
  constexpr int64_t panel = kPanel<float>;
  float* input = static_cast<float*>(scratch);
  float* product = input + kWinogradPoints * tiles * s.c;
  winograd_input(s, static_cast<const float*>(f.x), b.tile0, b.tile1, input);
  const int64_t parts = ceil_div(tiles, kMaxTile);
  for (int64_t q = b.panel0; q < b.panel1; ++q) {
    const float* weights = static_cast<const float*>(f.packed) + q * kWinogradPoints * s.c * panel;
    for (int64_t point = 0; point < kWinogradPoints; ++point, weights += s.c * panel) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t t0 = tiles * part / parts, t1 = tiles * (part + 1) / parts;
        product_of(t1 - t0)(input + (point * tiles + t0) * s.c, s.c, weights,
                            product + (point * tiles + t0) * panel);
      }
    }
    winograd_output(f, b.tile0, b.tile1, q * panel, product);
  }
}

// G g G^T of every filter, for panels [panel0, panel1).
inline void winograd_pack(const ConvShape& s, const WeightStrides& at, const float* weight,
                          int64_t panel0, int64_t panel1, float* to) {
  constexpr int64_t panel = kPanel<float>;
  constexpr double g[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};
  for (int64_t k = panel0 * panel; k < panel1 * panel; ++k) {
    for (int64_t c = 0; c < s.c; ++c) {
      const float* w = weight + k * at.k + c * at.c;
      double half[6][3];
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 3; ++j) {
          half[i][j] = g[i][0] * w[j * at.s] + g[i][1] * w[at.r + j * at.s] +
                       g[i][2] * w[2 * at.r + j * at.s];
        }
      }
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 6; ++j) {
          const double u = half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2];
          to[((k / panel * kWinogradPoints + i * 6 + j) * s.c + c) * panel + k % panel] =
              static_cast<float>(u);
        }
      }
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
