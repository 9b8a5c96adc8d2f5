// The weight gradient as a plain sum: dw[k][tap][c] = sum over pixels of dz[p][k] p(x)[p + tap][c].
//
// A block of pixels of dz is copied through its prologue to panels [k / lanes][p][lanes], and the
// input under one tap, two vectors of channels at a time, to [p][two vectors]; for pairs of terms
// (direct_terms.h) p becomes p / 2, and the two pixels are innermost, after the channel. A pair of
// panels makes its part of dw in registers, 8 rows by two vectors (4 by two with 16 registers),
// which is added to dw in memory once for each block, or stored by the first one: some hundred
// terms are added in registers.
//
// Work is cut by ranges of input channels, and where these are few by groups of pixels, each of
// which computes a dw of its own; these are added in order.
#pragma once

#include "direct_product.h"

namespace fr {
namespace FR_ISA {

constexpr int kOuterRows = FR_VECTOR_BYTES == 64 ? 8 : 4;
// Input channels of a block. dz is copied again for each such range, beside one multiplication of
// each of its elements for every channel of the range and tap of the kernel.
FR_INLINE int64_t range_channels(const ConvShape& s) { return s.kh * s.kw == 1 ? 256 : 64; }

// Output channels of a block. The copies of their dz are read once for each two vectors of the
// input, from the L2 cache.
constexpr int64_t kRangeOutputs = 512;

// Pixels that are summed in registers: their two vectors of the input stay in the L1 cache, beside
// one panel of dz, while iterating over all panels of dz.
constexpr int64_t kOuterPixels = 224 / kTilePixels * kTilePixels;

// The operand's pixels `from` (-1: padding), kVecs vectors of channels from c, to [pixels / kTerms]
// [kVecs vectors of words].
template <int kVecs, class M, class P>
__attribute__((noinline)) void copy_words(P in, const int64_t* from, int64_t count,
                                          int64_t channels, int64_t c, Element<M>* to) {
  using A = typename M::A;
  constexpr int64_t lanes = kLanes<A>, ahead = 8;
  typename P::Channel channel[kVecs];
  for (int v = 0; v < kVecs; ++v) channel[v] = in.channel(c + v * lanes);
  for (int64_t p = 0; p < count; p += M::kTerms) {
    for (int64_t i = 0; i < M::kTerms; ++i)
      if (p + i + ahead < count) in.prefetch(max_of(from[p + i + ahead], 0) * channels + c);
    for (int v = 0; v < kVecs; ++v, to += kWords<M>) {
      Vec<A> terms[M::kTerms]{};
      for (int64_t i = 0; i < M::kTerms; ++i) {
        if (p + i < count && from[p + i] >= 0)
          terms[i] = in.get(from[p + i] * channels + c + v * lanes, channel[v]);
      }
      M::put_words(terms, to);
    }
  }
}

// acc += the sum over `count` words of pixels, one chain of additions, of a row of kRows words
// (`row_step` elements apart) times one of kVecs vectors. Leaves rows and cols past the last word.
template <int kRows, int kVecs, class M>
FR_INLINE void add_products(Vec<typename M::A> (&acc)[kRows][kVecs], const Element<M>*& rows,
                            int64_t row_step, const Element<M>*& cols, int64_t count) {
  for (int64_t p = 0; p < count; ++p, rows += row_step, cols += kVecs * kWords<M>) {
    __builtin_prefetch(rows + 8 * row_step);
    typename M::Word col[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) col[v] = M::words(cols + v * kWords<M>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename M::Word row = M::spread(rows + i * M::kTerms);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[i][v] = M::add(acc[i][v], row, col[v]);
    }
  }
}

// kRows rows of `to`, kVecs vectors each, += acc, or = acc if this is their `first` write.
template <int kRows, int kVecs, class A>
FR_INLINE void add_to_rows(const Vec<A> (&acc)[kRows][kVecs], A* to, int64_t to_step, bool first) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      A* const at = to + i * to_step + v * kLanes<A>;
      store(first ? acc[i][v] : load(at) + acc[i][v], at);
    }
}

// kRows rows of `to`, kVecs vectors each, += (or =) the sum over `count` words of pixels.
template <int kRows, int kVecs, class M>
FR_INLINE void outer_product(const Element<M>* rows, int64_t row_step, const Element<M>* cols,
                             int64_t count, typename M::A* to, int64_t to_step, bool first) {
  using A = typename M::A;
  Vec<A> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec<A>{};
  // The sum so far, where the pixels are more than one chain of additions.
  Vec<A> far[kRows][kVecs];
  for (int64_t left = count; left > 0; left -= kChain) {
    add_products<kRows, kVecs, M>(acc, rows, row_step, cols, min_of(left, kChain));
    if (count <= kChain) break;
    const bool begun = left < count, last = left <= kChain;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        if (begun) acc[i][v] += far[i][v];
        if (last) continue;
        far[i][v] = acc[i][v];
        acc[i][v] = Vec<A>{};
      }
  }
  add_to_rows<kRows, kVecs, A>(acc, to, to_step, first);
}

// A panel of kVecs vectors of input channels with all of dz, whose k-th column begins at
// rows + k / lanes * panel_step + k % lanes words; `count` pixels.
template <int kVecs, class M>
__attribute__((noinline)) void outer_products(const Element<M>* rows, int64_t panel_step,
                                              int64_t row_step, int64_t k, const Element<M>* cols,
                                              int64_t count, typename M::A* to, int64_t to_step,
                                              bool first) {
  constexpr int64_t lanes = kLanes<typename M::A>;
  for (int64_t i = 0; i < k; i += kOuterRows) {
    outer_product<kOuterRows, kVecs, M>(rows + i / lanes * panel_step + i % lanes * M::kTerms,
                                        row_step, cols, ceil_div(count, M::kTerms),
                                        to + i * to_step, to_step, first);
  }
}

struct WeightPlan {
  int64_t ranges, output_ranges, parts;  // of input and output channels, and of pixels
  int64_t range, part;                   // how many each has

  explicit WeightPlan(const ConvShape& s) {
    const int64_t pixels = s.n * s.out_h() * s.out_w(), numel = s.k * s.depth();
    range = min_of(range_channels(s), s.c);
    output_ranges = ceil_div(s.k, kRangeOutputs);
    ranges = ceil_div(s.c, range);
    // Sixteen blocks, unless adding the parts would take longer than reading the maps a few times.
    const int64_t most = pixels * (s.k + s.c) / 2 / numel;
    parts = max_of(
        min_of(min_of(ceil_div(16, ranges * output_ranges), ceil_div(pixels, kSumRows)), most), 1);
    part = ceil_div(pixels, parts);
    parts = max_of(ceil_div(pixels, max_of(part, 1)), 1);
  }
};

// The pixels and the channels of a block of work.
struct WeightBlock {
  int64_t part, p0, p1, k0, k1, c0, c1;

  WeightBlock(const ConvShape& s, int64_t block) {
    const WeightPlan plan(s);
    c0 = block % plan.ranges * plan.range;
    c1 = min_of(c0 + plan.range, s.c);
    block /= plan.ranges;
    k0 = block % plan.output_ranges * kRangeOutputs;
    k1 = min_of(k0 + kRangeOutputs, s.k);
    part = block / plan.output_ranges;
    p0 = part * plan.part;
    p1 = min_of(p0 + plan.part, s.n * s.out_h() * s.out_w());
  }

  // The part's own copy of `dw`.
  template <class A>
  FR_INLINE A* of(const ConvShape& s, void* dw) const {
    return static_cast<A*>(dw) + part * s.k * s.depth();
  }
};

inline int64_t direct_weight_blocks(const ConvShape& s) {
  const WeightPlan plan(s);
  return plan.ranges * plan.output_ranges * plan.parts;
}

inline int64_t direct_weight_parts(const ConvShape& s) { return WeightPlan(s).parts; }

template <class M>
int64_t direct_weight_scratch(const ConvShape& s) {
  return ProductScratch<M>::bytes(0, kOuterPixels,
                                  min_of(s.k, kRangeOutputs) + kPanelWidth<typename M::A>);
}

template <class T, class M>
void direct_weight_gradient(const TrainingBackward& f, int64_t number, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const ConvShape& s = f.shape;
  const WeightBlock block(s, number);
  const Grid grid = forward_grid(s);
  const int64_t rows = kOuterPixels, to_step = s.depth(), outputs = block.k1 - block.k0;
  const ProductScratch<M> scratch(memory, 0);
  Element<M>* const dz = scratch.rows;
  Element<M>* const x = dz + rows * outputs;
  A* const dw = block.of<A>(s, f.dw);
  with_gradient<T>(f, [&](const auto& gradient) {
    with_input<T>(f, [&](const auto& input) {
      for (int64_t p0 = block.p0; p0 < block.p1; p0 += rows) {
        const int64_t count = min_of(rows, block.p1 - p0);
        const bool first = p0 == block.p0;
        for (int64_t i = 0; i < count; ++i) scratch.from[i] = p0 + i;
        for (int64_t k = block.k0; k < block.k1; k += lanes)
          copy_words<1, M>(gradient, scratch.from, count, s.k, k, dz + (k - block.k0) * rows);
        for (int64_t tap = 0; tap < grid.taps(); ++tap) {
          grid.sources(tap / s.kw, tap % s.kw, p0, count, scratch.from);
          for (int64_t c = block.c0; c < block.c1; c += width) {
            A* const to = dw + block.k0 * to_step + tap * s.c + c;
            if (c + width <= block.c1) {
              copy_words<2, M>(input, scratch.from, count, s.c, c, x);
              outer_products<2, M>(dz, rows * lanes, kWords<M>, outputs, x, count, to, to_step,
                                   first);
            } else {
              copy_words<1, M>(input, scratch.from, count, s.c, c, x);
              outer_products<1, M>(dz, rows * lanes, kWords<M>, outputs, x, count, to, to_step,
                                   first);
            }
          }
        }
      }
    });
  });
}

// --- Both gradients of a 1x1 of stride 1 in one pass. --------------------------------------------
//
// A chunk of dz is computed once, in rows as the data gradient needs them. Every two vectors of the
// input are read from memory once, for the mask and the sums, and then from the cache for the
// weight gradient. Single terms serve both; pairs along the channels are copied to panels of pairs
// along the pixels.

template <class M>
int64_t direct_both_scratch(const ConvShape& s) {
  const int64_t elements = ProductPlan::row_elements(s.k, kBytes<M>) + kPanelWidth<typename M::A>;
  const int64_t panels = M::kTerms > 1 ? s.k : 0;
  return ProductScratch<M>::bytes(kGradientRows * s.c, kOuterPixels, elements + panels);
}

template <class T, class M>
void direct_both_gradients(const TrainingBackward& f, int64_t number, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const ConvShape& s = f.shape;
  const WeightBlock block(s, number);
  const int64_t rows = kOuterPixels, step = ProductPlan::row_elements(s.k, kBytes<M>);
  const ProductScratch<M> scratch(memory, kGradientRows * s.c);
  Element<M>* const dz = scratch.rows;
  Element<M>* const x = dz + rows * step;
  // dz as the weight gradient reads it.
  constexpr bool pairs = M::kTerms > 1;
  Element<M>* const panels = pairs ? x + rows * width : dz;
  const int64_t panel_step = pairs ? rows * lanes : lanes, row_step = pairs ? kWords<M> : step;
  A* const dw = block.of<A>(s, f.dw);
  const Element<M>* weight = static_cast<const Element<M>*>(f.weight);
  const auto number_pixels = [&](int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) scratch.from[i] = first + i;
  };
  with_gradient<T>(f, [&](const auto& in) {
    with_input_and_gradient<T>(f, number, scratch.near, [&](const auto& input, const auto& e) {
      e.begin();
      for (int64_t p0 = block.p0; p0 < block.p1; p0 += rows) {
        const int64_t count = min_of(rows, block.p1 - p0), tiles = ceil_div(count, kTilePixels);
        const bool first = p0 == block.p0;
        for (int64_t i = 0; i < count; ++i) scratch.at[i] = (p0 + i) * s.c;
        number_pixels(p0, count);
        copy_channels<M>(in, scratch.from, count, s.k, 0, s.k, dz, step);
        if constexpr (pairs) {
          number_pixels(0, count);
          for (int64_t k = 0; k < s.k; k += lanes)
            copy_words<1, M>(Plain<Element<M>>{dz}, scratch.from, count, step, k,
                             panels + k * rows);
          number_pixels(p0, count);
        }
        const int64_t share = count * s.k * width / (tiles * (block.c1 - block.c0));
        const NextOperand next(in, (p0 + count) * s.k, share, tiles);
        for (int64_t c = block.c0, panel = 0; c < block.c1; c += width, ++panel) {
          const int64_t end = min_of(c + width, block.c1);
          product_columns<M>(count, dz, step, s.k, weight, c, end, next, panel, e, scratch.at,
                             false);
          if (end - c == width) {
            copy_words<2, M>(input, scratch.from, count, s.c, c, x);
            outer_products<2, M>(panels, panel_step, row_step, s.k, x, count, dw + c, s.c, first);
          } else {
            copy_words<1, M>(input, scratch.from, count, s.c, c, x);
            outer_products<1, M>(panels, panel_step, row_step, s.k, x, count, dw + c, s.c, first);
          }
        }
        e.fold();
      }
    });
  });
}

}  // namespace FR_ISA
}  // namespace fr
