// The weight gradient as a plain sum: dw[k][tap][c] = sum over pixels of dz[p][k] p(x)[p + tap][c].
//
// A block of pixels of dz is copied through its prologue to panels [k / lanes][p][lanes], and the
// input under one tap, two vectors of channels at a time, to [p][two vectors]. A pair of panels
// makes its part of dw in registers, 8 rows by two vectors (4 by two with 16 registers), which is
// added to dw in memory once for each block: some hundred terms are added in registers.
//
// Work is cut by ranges of input channels, and where these are few by groups of pixels, each of
// which makes a dw of its own, to be added in order.
#pragma once

#include "direct_product.h"

namespace fr {
namespace FR_ISA {

constexpr int kOuterRows = FR_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kRangeChannels = 256;  // dz is copied anew for each range

// Pixels that are summed in registers: their two vectors of the input stay in the L1 cache beside a
// panel of dz while all of dz's panels pass by.
constexpr int64_t kOuterPixels = 224 / kTilePixels * kTilePixels;

// kRows rows of `to`, kVecs vectors each, += the sum over `count` pixels of a row of kRows elements
// (pixels `row_step` apart) times one of kVecs vectors.
template <int kRows, int kVecs, class A>
FR_INLINE void outer_product(const A* rows, int64_t row_step, const A* cols, int64_t count, A* to,
                             int64_t to_step) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec<A>{};
  // What is summed so far, where the pixels are more than one chain of additions.
  Vec<A> far[kRows][kVecs];
  for (int64_t left = count; left > 0; left -= kChain) {
    const int64_t length = min_of(left, kChain);
    for (int64_t p = 0; p < length; ++p, rows += row_step, cols += kVecs * lanes) {
      __builtin_prefetch(rows + 8 * row_step);
      Vec<A> col[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) col[v] = load(cols + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<A> row = broadcast<A>(rows[i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[i][v] += row * col[v];
      }
    }
    if (count <= kChain) break;
    const bool first = left == count, last = left <= kChain;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        if (!first) acc[i][v] += far[i][v];
        if (last) continue;
        far[i][v] = acc[i][v];
        acc[i][v] = Vec<A>{};
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      A* const at = to + i * to_step + v * lanes;
      store(load(at) + acc[i][v], at);
    }
}

// A panel of kVecs vectors of input channels with all of dz, whose k-th column begins at
// rows + k / lanes * panel_step + k % lanes.
template <int kVecs, class A>
__attribute__((noinline)) void outer_products(const A* rows, int64_t panel_step, int64_t row_step,
                                              int64_t k, const A* cols, int64_t count, A* to,
                                              int64_t to_step) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < k; i += kOuterRows) {
    outer_product<kOuterRows, kVecs>(rows + i / lanes * panel_step + i % lanes, row_step, cols,
                                     count, to + i * to_step, to_step);
  }
}

struct WeightPlan {
  int64_t ranges, parts;  // of channels, and of pixels
  int64_t range, part;    // how many each has

  explicit WeightPlan(const ConvShape& s) {
    const int64_t pixels = s.n * s.out_h() * s.out_w(), numel = s.k * s.depth();
    ranges = ceil_div(s.c, kRangeChannels);
    range = min_of(kRangeChannels, s.c);
    // Sixteen blocks, unless to add the parts would take longer than a few reads of the maps.
    const int64_t most = pixels * (s.k + s.c) / 2 / numel;
    parts = max_of(min_of(min_of(ceil_div(16, ranges), ceil_div(pixels, kSumRows)), most), 1);
    part = ceil_div(pixels, parts);
    parts = max_of(ceil_div(pixels, max_of(part, 1)), 1);
  }
};

// The pixels and the channels of a block of work.
struct WeightBlock {
  int64_t part, p0, p1, c0, c1;

  WeightBlock(const ConvShape& s, int64_t block) {
    const WeightPlan plan(s);
    part = block / plan.ranges;
    p0 = part * plan.part;
    p1 = min_of(p0 + plan.part, s.n * s.out_h() * s.out_w());
    c0 = block % plan.ranges * plan.range;
    c1 = min_of(c0 + plan.range, s.c);
  }

  // Its own places of `dw`, set to zero.
  template <class A>
  FR_INLINE A* clear(const ConvShape& s, void* dw) const {
    A* const to = static_cast<A*>(dw) + part * s.k * s.depth();
    for (int64_t row = 0; row < s.k * s.kh * s.kw; ++row)
      for (int64_t c = c0; c < c1; ++c) to[row * s.c + c] = 0;
    return to;
  }
};

template <class A>
int64_t direct_weight_blocks(const ConvShape& s) {
  const WeightPlan plan(s);
  return plan.ranges * plan.parts;
}

template <class A>
int64_t direct_weight_parts(const ConvShape& s) {
  return WeightPlan(s).parts;
}

template <class A>
int64_t direct_weight_scratch(const ConvShape& s) {
  return ProductScratch<A>::bytes(0, kOuterPixels, s.k + kPanelWidth<A>);
}

template <class T>
void direct_weight_gradient(const TrainingBackward& f, int64_t number, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const ConvShape& s = f.shape;
  const WeightBlock block(s, number);
  const Grid grid = forward_grid(s);
  const int64_t rows = kOuterPixels, to_step = s.depth();
  const ProductScratch<A> scratch(memory, 0);
  A* const dz = scratch.rows;
  A* const x = dz + rows * s.k;
  A* const dw = block.clear<A>(s, f.dw);
  with_gradient<T>(f, [&](const auto& gradient) {
    with_input<T>(f, [&](const auto& input) {
      for (int64_t p0 = block.p0; p0 < block.p1; p0 += rows) {
        const int64_t count = min_of(rows, block.p1 - p0);
        for (int64_t i = 0; i < count; ++i) scratch.from[i] = p0 + i;
        for (int64_t k = 0; k < s.k; k += lanes)
          copy_vectors<1>(gradient, scratch.from, count, s.k, k, dz + k * rows, lanes);
        for (int64_t tap = 0; tap < grid.taps(); ++tap) {
          grid.sources(tap / s.kw, tap % s.kw, p0, count, scratch.from);
          for (int64_t c = block.c0; c < block.c1; c += width) {
            A* const to = dw + tap * s.c + c;
            if (c + width <= block.c1) {
              copy_vectors<2>(input, scratch.from, count, s.c, c, x, width);
              outer_products<2>(dz, rows * lanes, lanes, s.k, x, count, to, to_step);
            } else {
              copy_vectors<1>(input, scratch.from, count, s.c, c, x, lanes);
              outer_products<1>(dz, rows * lanes, lanes, s.k, x, count, to, to_step);
            }
          }
        }
      }
    });
  });
}

// --- Both gradients of a 1x1 of stride 1 in one pass. --------------------------------------------
//
// A chunk of dz is made once, in rows as the data gradient wants them, and each two vectors of the
// input are read once: for the mask and the sums, and from the cache for the weight gradient.

template <class A>
int64_t direct_both_scratch(const ConvShape& s) {
  return ProductScratch<A>::bytes(kGradientRows * s.c, kOuterPixels,
                                  ProductPlan::row_elements(s.k, sizeof(A)) + kPanelWidth<A>);
}

template <class T>
void direct_both_gradients(const TrainingBackward& f, int64_t number, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const ConvShape& s = f.shape;
  const WeightBlock block(s, number);
  const int64_t rows = kOuterPixels, step = ProductPlan::row_elements(s.k, sizeof(A));
  const ProductScratch<A> scratch(memory, kGradientRows * s.c);
  A* const dz = scratch.rows;
  A* const x = dz + rows * step;
  A* const dw = block.clear<A>(s, f.dw);
  const A* weight = static_cast<const A*>(f.weight);
  with_gradient<T>(f, [&](const auto& in) {
    with_input<T>(f, [&](const auto& input) {
      with_input_gradient<T>(f, number, scratch.near, [&](const auto& e) {
        e.begin();
        for (int64_t p0 = block.p0; p0 < block.p1; p0 += rows) {
          const int64_t count = min_of(rows, block.p1 - p0), tiles = ceil_div(count, kTilePixels);
          for (int64_t i = 0; i < count; ++i) {
            scratch.from[i] = p0 + i;
            scratch.at[i] = (p0 + i) * s.c;
          }
          copy_channels(in, scratch.from, count, s.k, 0, s.k, dz, step);
          const int64_t share = count * s.k * width / (tiles * (block.c1 - block.c0));
          const auto next = [&](int64_t q, int64_t i) {
            const int64_t tile = (q - block.c0) / width * tiles + i / kTilePixels;
            return in.ahead((p0 + count) * s.k + tile * share);
          };
          for (int64_t c = block.c0; c < block.c1; c += width) {
            const int64_t end = min_of(c + width, block.c1);
            product_columns(count, dz, step, s.k, weight, c, end, next, e, scratch.at, false);
            if (end - c == width) {
              copy_vectors<2>(input, scratch.from, count, s.c, c, x, width);
              outer_products<2>(dz, lanes, step, s.k, x, count, dw + c, s.c);
            } else {
              copy_vectors<1>(input, scratch.from, count, s.c, c, x, lanes);
              outer_products<1>(dz, lanes, step, s.k, x, count, dw + c, s.c);
            }
          }
          e.fold();
        }
      });
    });
  });
}

}  // namespace FR_ISA
}  // namespace fr
