// A training convolution by Winograd's F(4x4, 3x3), stride 1, padding 1, channels-last: the forward
// and the data gradient, with everything around them fused (fusion.h).
//
//   forward         z   = A^T [ (G w G^T) . (B^T p(x) B) ] A
//   data gradient   g_x = the same of dz, with the weight transposed and turned by 180 degrees
//
// 36 products make 16 results where the direct sum takes 144. At each of the 36 points they are a
// matrix product of [tiles x depth] by [depth x panel], with as many accumulators as the direct
// kernel has. Bytes: the maps once each, as prologue and epilogue are part of the transforms.
//
// How it is cut. What a group of tiles has at its points is 2.25 times its input, in float32. It is
// written once and read for each panel of results, so a group is as large as half of the L2 cache
// allows. Transforming a weight costs as much as the products of about 12 tiles. Up to 256 x 256
// channels all of it (36 C K floats) is kept for the call and comes from the caches for each group,
// which costs less than transforming it again. Above, transformed weights would be 38 MB: a group
// is then 64 tiles, and a panel's weights are transformed, 64 channels at a time, from the
// parameter itself. Measured on a core with 2 MiB of L2, both choices are worth 10 to 30%.
//
// Error: the coefficients of F(4, 3), up to 8, cost about two bits against the direct sum: relative
// 1 to 2.4e-6 where that has 3e-7. A value that is not finite spreads over its whole tile.
//
// Source: Winograd, 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015.
#pragma once

#include "winograd_ahead.h"
#include "winograd_filters.h"

namespace fr {
namespace FR_ISA {

constexpr int64_t kBytesOfKeptFilters = 10 * 1024 * 1024;

// A direction: reads `c` channels and makes `k`, of s.n images of s.h x s.w pixels. For the data
// gradient that is the forward's shape with c and k exchanged.
FR_INLINE ConvShape backward_shape(ConvShape s) {
  const int64_t c = s.c;
  s.c = s.k;
  s.k = c;
  return s;
}

// How a direction is cut. By the shape alone.
struct WinogradPlan {
  int64_t block;  // tiles of a block of sums
  int64_t group;  // tiles that go through all panels at a time
  int64_t depth;  // channels that are summed at a time
  bool kept;      // all transformed weights are made once for the call

  static WinogradPlan of(const ConvShape& s) {
    constexpr int64_t least = 2 * kMaxTile * (kMaxTile < 8 ? 2 : 1);
    const int64_t tiles = count_tiles(s), bytes = kTilePoints * s.c * s.k * 4;
    WinogradPlan p;
    p.kept = bytes <= kBytesOfKeptFilters && tiles > 2 * least;
    const int64_t group = !p.kept ? 64 : s.c <= 128 ? least : least * 3 / 2;
    p.block = even_piece(tiles, p.kept && s.c <= 128 ? 4 * group : group);
    p.group = even_piece(p.block, group);
    p.depth = min_of(s.c, p.kept ? 128 : 64);
    return p;
  }

  int64_t blocks(const ConvShape& s) const { return ceil_div(count_tiles(s), block); }
  int64_t end(const ConvShape& s, int64_t i) const {
    return min_of((i + 1) * block, count_tiles(s));
  }
};

// The layout of a thread's scratch, in floats: [chunk of channels][point][tile][depth] of the
// input, [point][channel][width] of a panel's weights and [point][tile][width] of its products.
// What one product reads is contiguous, so that the hardware prefetcher follows it.
struct WinogradLayout {
  int64_t tile, input_point, chunk, weight_point, product_point;  // steps
  int64_t input, weight, product;                                 // sizes; weight: of a panel

  static WinogradLayout of(const ConvShape& s, const WinogradPlan& p) {
    WinogradLayout l;
    l.tile = p.depth;
    l.input_point = odd_lines(p.group * l.tile);
    l.chunk = kTilePoints * l.input_point;
    l.weight_point = odd_lines((p.kept ? s.c : p.depth) * kPanel<float>);
    l.product_point = odd_lines(p.group * kPanel<float>);
    l.input = ceil_div(s.c, p.depth) * l.chunk;
    l.weight = kTilePoints * l.weight_point;
    l.product = kTilePoints * l.product_point;
    return l;
  }

  // Of a thread.
  int64_t floats(const WinogradPlan& p) const { return input + product + (p.kept ? 0 : weight); }
};

FR_INLINE int64_t panel_end(const ConvShape& s, int64_t q) {
  return min_of((q + 1) * kPanel<float>, s.k);
}

// Weights of panels [panel0, panel1) for all channels.
template <class T>
void keep_filters(const ConvShape& s, const WinogradFilter<T>& w, int64_t panel0, int64_t panel1,
                  float* kept) {
  const WinogradPlan plan = WinogradPlan::of(s);
  if (!plan.kept) return;
  const WinogradLayout l = WinogradLayout::of(s, plan);
  for (int64_t q = panel0; q < panel1; ++q) {
    const int64_t k0 = q * kPanel<float>;
    transform_filters(w, 0, s.c, k0, panel_end(s, q) - k0, l.weight_point, kept + q * l.weight);
  }
}

// [kTile x panel] at `to`, set or added to, by [kTile][depth], a row every `step`, times
// [depth][panel]. At every step prefetches a line of what the next product reads of each operand:
// the operands come from the L2 cache, and waiting for them would take a third of the time.
template <int kTile, int kVectors>
void tile_product(const float* x, int64_t step, int64_t depth, const float* w, const float* next_x,
                  const float* next_w, const char* stream, int64_t stream_step, bool first,
                  float* to) {
  constexpr int lanes = kLanes<float>;
  Floats acc[kTile][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Floats{};
    __builtin_prefetch(to + i * kVectors * lanes, 1);
    if (kVectors * lanes > kLineFloats)
      __builtin_prefetch(to + i * kVectors * lanes + kLineFloats, 1);
  }
  for (int64_t c = 0; c < depth; ++c, ++x, w += kVectors * lanes, next_x += kLineFloats,
               next_w += kLineFloats, stream += stream_step) {
    __builtin_prefetch(stream, 0, 2);
    __builtin_prefetch(next_x);
    __builtin_prefetch(next_w);
    Floats f[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) f[v] = load(w + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const Floats value = broadcast<float>(x[i * step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] += value * f[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, to += lanes)
      store(first ? acc[i][v] : acc[i][v] + load(to), to);
  }
}

using TileProduct = void (*)(const float*, int64_t, int64_t, const float*, const float*,
                             const float*, const char*, int64_t, bool, float*);

template <int kVectors>
TileProduct tile_product_of(int64_t tiles) {
  static constexpr TileProduct products[] = {
      tile_product<1, kVectors>,  tile_product<2, kVectors>,  tile_product<3, kVectors>,
      tile_product<4, kVectors>,  tile_product<5, kVectors>,  tile_product<6, kVectors>,
#if FR_VECTOR_BYTES == 64
      tile_product<7, kVectors>,  tile_product<8, kVectors>,  tile_product<9, kVectors>,
      tile_product<10, kVectors>, tile_product<11, kVectors>, tile_product<12, kVectors>,
      tile_product<13, kVectors>, tile_product<14, kVectors>,
#endif
  };
  return products[tiles - 1];
}

// What a convolution does with the maps: windows(tile0, tile1, layout, depth, to) transforms the
// input and results(tile0, tile1, k0, width, point, first, from) what the products are.
//
// One block, for panels [panel0, panel1). kept: weights as keep_filters leaves them.
template <class T, class Windows, class Results>
void winograd_block(const ConvShape& s, const WinogradPlan& plan, const WinogradFilter<T>& w,
                    const float* kept, int64_t block, int64_t panel0, int64_t panel1,
                    const TileStreams& streams, float* scratch, const Windows& windows,
                    const Results& results) {
  const WinogradLayout l = WinogradLayout::of(s, plan);
  float* const input = scratch;
  float* const product = input + l.input;
  float* const weight = product + l.product;
  const int64_t begin = block * plan.block, end = plan.end(s, block);
  for (int64_t t0 = begin; t0 < end; t0 += plan.group) {
    const int64_t t1 = min_of(t0 + plan.group, end), tiles = t1 - t0;
    const int64_t parts = ceil_div(tiles, kMaxTile);
    windows(t0, t1, l, plan.depth, input);
    TileWalk walk(streams, t1, tiles, kTilePoints * (panel1 - panel0) * parts * s.c);
    for (int64_t q = panel0; q < panel1; ++q) {
      const int64_t k0 = q * kPanel<float>, width = panel_end(s, q) - k0;
      const auto product_of =
          width == kPanel<float> ? tile_product_of<kPanelVectors> : tile_product_of<1>;
      for (int64_t c0 = 0; c0 < s.c; c0 += plan.depth) {
        const int64_t c1 = min_of(c0 + plan.depth, s.c), depth = c1 - c0;
        const float* filters = plan.kept ? kept + q * l.weight + c0 * width : weight;
        if (!plan.kept) transform_filters(w, c0, c1, k0, width, l.weight_point, weight);
        // The weights that are transformed after these products.
        const int64_t next_q = c1 < s.c ? q : q + 1 < panel1 ? q + 1 : panel0;
        const int64_t next_k = next_q * kPanel<float>;
        FilterLines<T> next_filters{w, c1 < s.c ? c1 : 0, plan.depth, next_k,
                                    panel_end(s, next_q) - next_k};
        const int64_t pieces =
            plan.kept ? 0 : ceil_div(9 * max_of(plan.depth, kPanel<float>), kTilePoints * parts);
        const float* x = input + c0 / plan.depth * l.chunk;
        for (int64_t p = 0; p < kTilePoints; ++p, x += l.input_point, filters += l.weight_point) {
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t i0 = tiles * part / parts, i1 = tiles * (part + 1) / parts;
            const float* const next_x = part + 1 < parts ? x + i1 * l.tile : x + l.input_point;
            const int64_t share = depth * width / kLineFloats * part / parts * kLineFloats;
            const float* const next_w = filters + l.weight_point + share;
            const char* const stream = walk.take(depth);
            next_filters.prefetch(pieces);
            product_of(i1 - i0)(x + i0 * l.tile, l.tile, depth, filters, next_x, next_w,
                                stream ? stream : reinterpret_cast<const char*>(next_w),
                                stream ? walk.bytes : 0, c0 == 0,
                                product + p * l.product_point + i0 * width);
          }
        }
      }
      results(t0, t1, k0, width, l.product_point, t0 == begin, product);
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
