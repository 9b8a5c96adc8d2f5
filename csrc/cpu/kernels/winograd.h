// Convolution by Winograd's F(4x4, 3x3) or F(2x2, 3x3), in float over maps of any narrower type,
// channels-last, stride 1, with the same epilogue.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A     for each m x m tile of the output, m + 2 of the input
//
// With m = 4, 36 multiplications make 16 outputs where the direct sum takes 144; with m = 2, 16
// make 4 where that takes 36, with fewer than half as many transformed weights and with tiles that
// fit small maps. At each of these points the products over channels are a matrix
// product of [tiles x C] by [C x panel], with as many accumulators as the direct kernel.
//
// The weight is packed for the direct kernel, [panel][r][s][c][panel]. Its transform is vectorised
// over output channels and computed in every block of tiles, for a panel and kWinogradDepth
// channels at a time, so that it stays in the L2 cache. That reads a quarter (or 9/16) of the bytes
// of stored transformed weights, and needs no memory for them. Bytes: x, w, y and the residual; the
// transformed input is 2.25 times (4 times) the input and is read once for each panel.
//
// Error: the coefficients of F(4, 3), up to 8, cost about two bits against the direct sum: relative
// 1e-6 where that has 3e-7. F(2, 3) has none above 1. A value that is not finite spreads over its
// whole tile.
//
// Source: Winograd, 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015.
#pragma once

#include "conv_bn_add_relu.h"
#include "table.h"
#include "vec.h"
#include "winograd_transforms.h"

namespace fr {
namespace FR_ISA {

// Points of a tile of kOut x kOut outputs on one axis.
template <int kOut>
constexpr int kIn = kOut + 2;
template <int kOut>
constexpr int kPoints = kIn<kOut> * kIn<kOut>;

// Input channels whose weights are transformed at a time: 36 points of 128 x 32 floats are 590 KB.
// More would not fit the L2; each pass after the first adds to the products, which costs 2%.
constexpr int64_t kWinogradDepth = 128;

constexpr int64_t kLineFloats = kLineBytes / static_cast<int64_t>(sizeof(float));

// The place of a tile: its image and its first output pixel.
template <int kOut>
struct TilePlace {
  int64_t n, y, x;

  static FR_INLINE TilePlace of(const ConvShape& s, int64_t tile) {
    const int64_t across = ceil_div(s.out_w(), kOut), down = ceil_div(s.out_h(), kOut);
    return {tile / (across * down), tile / across % down * kOut, tile % across * kOut};
  }

  // Moves to the next tile, without divisions.
  FR_INLINE void advance(int64_t out_h, int64_t out_w) {
    x += kOut;
    if (x < out_w) return;
    x = 0;
    y += kOut;
    if (y < out_h) return;
    y = 0;
    ++n;
  }
};

// The layout of a block's scratch, in floats: input [point][chunk][tile][channel of
// kWinogradDepth], weight [point][channel][panel] and product [point][tile][panel]. The operands of
// one product are contiguous, so that the hardware prefetcher follows them.
//
// A transform accesses all points at once. Points are an odd number of cache lines apart, because
// otherwise they would map to a few sets of the L1 cache (with 64 tiles of 16 channels to two,
// which takes twice as long). Tiles are a vector longer than their channels for the same reason.
struct WinogradScratch {
  int64_t tile, chunk;                               // strides of the input within a point
  int64_t input_point, weight_point, product_point;  // strides from point to point
  int64_t input, weight, product;                    // sizes
};

// B^T d B for a vector of channels of one tile, whose first pixel is at `from`. The loops are not
// unrolled: the compiler would load the whole tile at once and spill it.
template <int kOut, class T>
FR_INLINE void winograd_input_vector(const T* from, int64_t row, int64_t pixel, int64_t point,
                                     float* to) {
  constexpr int in = kIn<kOut>, lanes = kLanes<float>;
  float half[in][in * lanes];
#pragma GCC unroll 1
  for (int j = 0; j < in; ++j) {
    Floats d[in], o[in];
    load_line(from + j * pixel, row, d);
    transform_input(d, o);
    store_line(o, half[0] + j * lanes, in * lanes);
  }
#pragma GCC unroll 1
  for (int i = 0; i < in; ++i) {
    Floats d[in], o[in];
    load_line(half[i], lanes, d);
    transform_input(d, o);
    store_line(o, to + i * in * point, point);
  }
}

// Transforms the input of tiles [tile0, tile1). A tile that extends into the padding is copied into
// a frame of zeros first.
template <int kOut, class T>
void winograd_input(const ConvShape& s, const T* x, int64_t tile0, int64_t tile1,
                    const WinogradScratch& l, float* to) {
  constexpr int in = kIn<kOut>, lanes = kLanes<float>;
  const int64_t out_h = s.out_h(), out_w = s.out_w(), row = s.w * s.c;
  TilePlace<kOut> place = TilePlace<kOut>::of(s, tile0);
  for (int64_t tile = tile0; tile < tile1; ++tile, to += l.tile, place.advance(out_h, out_w)) {
    const int64_t y0 = place.y - s.pad_h, x0 = place.x - s.pad_w;
    const T* first = x + (place.n * s.h + y0) * row + x0 * s.c;
    const int64_t row0 = max_of(-y0, 0), row1 = min_of(s.h - y0, in);
    const int64_t col0 = max_of(-x0, 0), col1 = min_of(s.w - x0, in);
    const auto at = [&](int64_t c) {
      return to + c / kWinogradDepth * l.chunk + c % kWinogradDepth;
    };
    if (row1 - row0 == in && col1 - col0 == in) {
      for (int64_t c = 0; c < s.c; c += lanes)
        winograd_input_vector<kOut>(first + c, row, s.c, l.input_point, at(c));
      continue;
    }
    float frame[in][in * lanes] = {};
    for (int64_t c = 0; c < s.c; c += lanes) {
      for (int64_t i = row0; i < row1; ++i) {
        for (int64_t j = col0; j < col1; ++j)
          store(load(first + i * row + j * s.c + c), frame[i] + j * lanes);
      }
      winograd_input_vector<kOut>(frame[0], in * lanes, lanes, l.input_point, at(c));
    }
  }
}

// G g G^T for a vector of filters; tap(r, s) returns their elements at (r, s).
template <int kOut, class Tap>
FR_INLINE void winograd_filters(Tap tap, int64_t point, float* to) {
  constexpr int in = kIn<kOut>;
  Floats half[3][in];
  for (int col = 0; col < 3; ++col) {
    const Floats g[3] = {tap(0, col), tap(1, col), tap(2, col)};
    transform_weight(g, half[col]);
  }
  for (int row = 0; row < in; ++row) {
    const Floats g[3] = {half[0][row], half[1][row], half[2][row]};
    Floats o[in];
    transform_weight(g, o);
    store_line(o, to + row * in * point, point);
  }
}

// Transforms the filters of a panel for channels [c0, c1); packed is [r][s][channel][panel].
template <int kOut>
void winograd_weight(const ConvShape& s, const float* packed, int64_t panel, int64_t c0, int64_t c1,
                     const WinogradScratch& l, float* to) {
  for (int64_t i = 0; i < (c1 - c0) * panel; i += kLanes<float>) {
    const auto tap = [&](int row, int col) {
      return load(packed + ((row * 3 + col) * s.c + c0) * panel + i);
    };
    winograd_filters<kOut>(tap, l.weight_point, to + i);
  }
}

// The same for a weight packed in pairs, [r][s][channel / 2][panel][2]: see conv_bfloat16.h. A pair
// is a 32-bit word whose halves are the leading bits of two floats.
template <int kOut>
void winograd_weight(const ConvShape& s, const BFloat16* packed, int64_t panel, int64_t c0,
                     int64_t c1, const WinogradScratch& l, float* to) {
  for (int64_t c = 0; c < c1 - c0; ++c, to += panel) {
    for (int64_t v = 0; v < panel; v += kLanes<float>) {
      const auto tap = [&](int row, int col) {
        const int64_t pair = ((row * 3 + col) * s.c + c0 + c) / 2;
        const U32 words = load_raw<U32>(packed + 2 * (pair * panel + v));
        const U32 bits = c % 2 == 0 ? words << 16 : words & 0xffff0000u;
        return load_raw<Floats>(&bits);
      };
      winograd_filters<kOut>(tap, l.weight_point, to + v);
    }
  }
}

// The width and offset of a panel in the packed weight. Panels of pairs always have the full width,
// with zeros after the last filter.
FR_INLINE int64_t packed_width(const ConvShape& s, int64_t q, const float*) {
  return panel_width<float>(s, q * kPanel<float>);
}
FR_INLINE int64_t packed_width(const ConvShape&, int64_t, const BFloat16*) { return kPanel<float>; }
FR_INLINE int64_t packed_offset(const ConvShape& s, int64_t q, const float*) {
  return panel_offset<float>(s, q);
}
FR_INLINE int64_t packed_offset(const ConvShape& s, int64_t q, const BFloat16*) {
  return q * kPanel<float> * s.depth();
}

// to[tiles][panel] = (first ? 0 : to) + a[tiles][depth] b[depth][panel], where the rows of a are
// `stride` apart. Every step prefetches one line at `ahead`.
template <int kTile, int kVectors>
void winograd_product(const float* a, int64_t stride, int64_t depth, const float* b,
                      const void* ahead, bool first, float* to) {
  constexpr int lanes = kLanes<float>;
  const char* line = static_cast<const char*>(ahead);
  Floats acc[kTile][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Floats{};
  }
  for (int64_t c = 0; c < depth; ++c, ++a, b += kVectors * lanes, line += kLineBytes) {
    __builtin_prefetch(line, 0, 2);
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

using WinogradProduct = void (*)(const float*, int64_t, int64_t, const float*, const void*, bool,
                                 float*);

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

// Transforms the products of tiles [tile0, tile1) into the output, for the panel at channel k.
template <int kOut, class T>
void winograd_output(const ConvForward& f, int64_t tile0, int64_t tile1, int64_t k, int64_t panel,
                     const WinogradScratch& l, const float* from) {
  constexpr int lanes = kLanes<float>, in = kIn<kOut>;
  const ConvShape& s = f.shape;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t channels = s.k;
  const int64_t end = min_of(panel, channels - k);
  const T* residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const Floats floor = activation_floor<float>(f.activation);
  TilePlace<kOut> place = TilePlace<kOut>::of(s, tile0);
  for (int64_t tile = tile0; tile < tile1; ++tile, from += panel, place.advance(out_h, out_w)) {
    const int64_t rows = min_of(kOut, out_h - place.y);
    const int64_t cols = min_of(kOut, out_w - place.x);
    for (int64_t v = 0; v < end; v += lanes) {
      Floats half[kOut][in];
      for (int j = 0; j < in; ++j) {
        Floats column[in], o[kOut];
        load_line(from + j * l.product_point + v, in * l.product_point, column);
        transform_output(column, o);
        for (int i = 0; i < kOut; ++i) half[i][j] = o[i];
      }
      const Floats scale = load(static_cast<const float*>(f.scale) + k + v);
      const Floats shift = load(static_cast<const float*>(f.shift) + k + v);
      for (int64_t i = 0; i < rows; ++i) {
        Floats o[kOut];
        transform_output(half[i], o);
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t at =
              ((place.n * out_h + place.y + i) * out_w + place.x + j) * channels + k + v;
          Floats r = o[j] * scale + shift;
          if (residual) r += load(residual + at);
          store(floor_vector(floor, r), y + at);
        }
      }
    }
  }
}

template <int kOut>
WinogradScratch winograd_scratch(const ConvShape& s, int64_t tiles) {
  const auto apart = [](int64_t floats) {
    return (ceil_div(floats, kLineFloats) | 1) * kLineFloats;
  };
  WinogradScratch l;
  l.tile = min_of(s.c, kWinogradDepth) + kLanes<float>;
  l.chunk = tiles * l.tile;
  l.input_point = apart(ceil_div(s.c, kWinogradDepth) * l.chunk);
  l.weight_point = apart(min_of(s.c, kWinogradDepth) * kPanel<float>);
  l.product_point = apart(tiles * kPanel<float>);
  l.input = kPoints<kOut> * l.input_point;
  l.weight = kPoints<kOut> * l.weight_point;
  l.product = kPoints<kOut> * l.product_point;
  return l;
}

// Whether a block keeps the transformed weights of all panels. With few channels they are small,
// and the transforms cost as much as the products. Groups of tiles then go through all steps one
// after another, so that the transformed input is read from the L1 cache: this saves 7% of the time
// of a layer of 16 channels, 3% of one of 32.
template <int kOut>
bool winograd_keeps_weight(const ConvShape& s) {
  constexpr int64_t kMost = 192 * 1024;
  return s.c <= kWinogradDepth &&
         kPoints<kOut> * s.c * s.k * static_cast<int64_t>(sizeof(float)) <= kMost;
}

// Tiles of a group: a multiple of the tiles of one product.
constexpr int64_t kGroupTiles = FR_VECTOR_BYTES == 64 ? 14 : 18;

template <int kOut>
int64_t winograd_groups(const ConvShape& s, int64_t tiles) {
  return winograd_keeps_weight<kOut>(s) ? ceil_div(tiles, kGroupTiles) : 1;
}

// Number of panels whose transformed weights are kept at a time.
template <int kOut>
int64_t winograd_held_panels(const ConvShape& s) {
  return winograd_keeps_weight<kOut>(s) ? ceil_div(s.k, kPanel<float>) : 1;
}

template <int kOut>
int64_t winograd_scratch_bytes(const ConvShape& s, int64_t tiles) {
  const WinogradScratch l =
      winograd_scratch<kOut>(s, ceil_div(tiles, winograd_groups<kOut>(s, tiles)));
  const int64_t floats = l.input + winograd_held_panels<kOut>(s) * l.weight + l.product;
  return floats * static_cast<int64_t>(sizeof(float));
}

// Prefetches the packed weights that are transformed next, taps of `length` elements, into the L2
// cache during the products. Without it a tenth of ResNet-18's time at batch 1 was spent waiting.
template <class Weight>
struct WeightAhead {
  const Weight* tap;
  int64_t step, length;
  int64_t taps = 9, at = 0;

  // The address of the next `lines` lines, or null at the end.
  FR_INLINE const void* take(int64_t lines) {
    if (at >= length) {
      at = 0;
      tap += step;
      --taps;
    }
    if (taps <= 0) return nullptr;
    const Weight* from = tap + at;
    at += lines * kLineBytes / static_cast<int64_t>(sizeof(Weight));
    return from;
  }
};

// Computes one group of tiles for all panels. If `held`, the weights are transformed already.
template <int kOut, class T, class Weight>
void winograd_group(const ConvForward& f, const WinogradBlock& b, const WinogradScratch& l,
                    bool held, float* input, float* product, float* weight) {
  const ConvShape& s = f.shape;
  const Weight* const all = static_cast<const Weight*>(f.packed);
  const int64_t tiles = b.tile1 - b.tile0, parts = ceil_div(tiles, kMaxTile);
  winograd_input<kOut>(s, static_cast<const T*>(f.x), b.tile0, b.tile1, l, input);
  // The weights that are transformed after channel c of panel q.
  const auto ahead_of = [&](int64_t q, int64_t c) {
    if (c == s.c) {
      ++q;
      c = 0;
    }
    if (held || q == b.panel1) return WeightAhead<Weight>{nullptr, 0, 0, 0};
    const int64_t width = packed_width(s, q, all);
    return WeightAhead<Weight>{all + packed_offset(s, q, all) + c * width, s.c * width,
                               min_of(s.c - c, kWinogradDepth) * width, 9};
  };
  for (int64_t q = b.panel0; q < b.panel1; ++q) {
    const int64_t panel = packed_width(s, q, all);
    const auto products = panel == kPanel<float> ? product_of<kPanelVectors> : product_of<1>;
    float* const w = held ? weight + (q - b.panel0) * l.weight : weight;
    for (int64_t c0 = 0; c0 < s.c; c0 += kWinogradDepth) {
      const int64_t c1 = min_of(c0 + kWinogradDepth, s.c);
      const float* chunk = input + c0 / kWinogradDepth * l.chunk;
      if (!held) winograd_weight<kOut>(s, all + packed_offset(s, q, all), panel, c0, c1, l, w);
      WeightAhead<Weight> next = ahead_of(q, c1);
      for (int64_t point = 0; point < kPoints<kOut>; ++point) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t t0 = tiles * part / parts, t1 = tiles * (part + 1) / parts;
          const float* weights = w + point * l.weight_point;
          const void* ahead = next.take(c1 - c0);
          products(t1 - t0)(chunk + point * l.input_point + t0 * l.tile, l.tile, c1 - c0, weights,
                            ahead ? ahead : weights, c0 == 0,
                            product + point * l.product_point + t0 * panel);
        }
      }
    }
    winograd_output<kOut, T>(f, b.tile0, b.tile1, q * kPanel<float>, panel, l, product);
  }
}

// Input and output channels are multiples of the vector. Weight is the type of the packed weight.
template <int kOut, class T, class Weight>
void winograd(const ConvForward& f, const WinogradBlock& b, void* scratch) {
  const ConvShape& s = f.shape;
  const Weight* const all = static_cast<const Weight*>(f.packed);
  const bool held = winograd_keeps_weight<kOut>(s);
  const int64_t tiles = b.tile1 - b.tile0, groups = winograd_groups<kOut>(s, tiles);
  const WinogradScratch l = winograd_scratch<kOut>(s, ceil_div(tiles, groups));
  float* const input = static_cast<float*>(scratch);
  float* const product = input + l.input;
  float* const weight = product + l.product;
  for (int64_t q = b.panel0; held && q < b.panel1; ++q) {
    winograd_weight<kOut>(s, all + packed_offset(s, q, all), packed_width(s, q, all), 0, s.c, l,
                          weight + (q - b.panel0) * l.weight);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const WinogradBlock group{b.tile0 + tiles * g / groups, b.tile0 + tiles * (g + 1) / groups,
                              b.panel0, b.panel1};
    winograd_group<kOut, T, Weight>(f, group, l, held, input, product, weight);
  }
}

template <int kOut, class T, class Weight>
constexpr WinogradKernels winograd_of() {
  return {kOut, kPoints<kOut>, kLanes<float>, winograd_scratch_bytes<kOut>,
          winograd<kOut, T, Weight>};
}

}  // namespace FR_ISA
}  // namespace fr
