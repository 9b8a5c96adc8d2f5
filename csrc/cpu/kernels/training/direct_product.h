// The product of a direct convolution: [pixels x depth] times [depth x channels], by the terms M of
// direct_terms.h.
//
// Pixels of the operand are copied through the prologue to rows in the L2 cache, tap by tap and
// channel by channel, a vector longer than needed, so that a tile's rows do not all map to the same
// sets of the L1 cache where the depth is a power of two. The weight lies in panels [depth][two
// vectors]. A tile of 14 pixels by two vectors (6 by two with 16 registers) stays in registers from
// its first term to the epilogue: 28 multiply-adds for 16 loads, of which the 14 broadcasts are
// operands of the multiply-adds.
//
// While a block multiplies, it prefetches the next block's operand; otherwise arithmetic and memory
// would wait for each other.
#pragma once

#include "../panels.h"
#include "direct_grid.h"
#include "direct_terms.h"
#include "fusion.h"

namespace fr {
namespace FR_ISA {

constexpr int kTilePixels = FR_VECTOR_BYTES == 64 ? 14 : 6;
// Bytes of one block's rows. The L2 cache also holds what the next rows are made from.
constexpr int64_t kOperandBytes = 256 * 1024;
constexpr int64_t kMostRows = kSumRows / kTilePixels * kTilePixels;  // of one block

template <class A>
constexpr int64_t kPanelWidth = 2 * kLanes<A>;

template <class M>
FR_INLINE bool whole_vectors(const ConvShape& s) {
  return s.groups == 1 && s.c % kWords<M> == 0 && s.k % kWords<M> == 0;
}

// The operand's pixels `from` (-1: padding), kVecs vectors of channels from c, to rows `step`
// apart. A function of its own, as the loops that call it are compiled for each epilogue too; the
// prologue comes by value, so that no store may change it.
template <int kVecs, class M, class P>
__attribute__((noinline)) void copy_vectors(P in, const int64_t* from, int64_t count,
                                            int64_t channels, int64_t c, Element<M>* to,
                                            int64_t step) {
  using A = typename M::A;
  constexpr int64_t lanes = kLanes<A>, ahead = 8;
  typename P::Channel channel[kVecs];
  for (int v = 0; v < kVecs; ++v) channel[v] = in.channel(c + v * lanes);
  for (int64_t p = 0; p < count; ++p, to += step) {
    if (p + ahead < count) in.prefetch(max_of(from[p + ahead], 0) * channels + c);
    for (int v = 0; v < kVecs; ++v) {
      Vec<A> value{};
      if (from[p] >= 0) value = in.get(from[p] * channels + c + v * lanes, channel[v]);
      M::put(value, to + v * lanes);
    }
  }
}

// The same for channels [c, end).
template <class M, class P>
FR_INLINE void copy_channels(const P& in, const int64_t* from, int64_t count, int64_t channels,
                             int64_t c, int64_t end, Element<M>* to, int64_t step) {
  constexpr int64_t lanes = kLanes<typename M::A>;
  for (; c + 2 * lanes <= end; c += 2 * lanes, to += 2 * lanes)
    copy_vectors<2, M>(in, from, count, channels, c, to, step);
  if (c < end) copy_vectors<1, M>(in, from, count, channels, c, to, step);
}

constexpr int64_t kAheadBytes = 32;  // of what the next block reads, prefetched at each step

// What the tiles of a block prefetch of the next block's operand: each `share` elements, from
// element `first` on.
struct NextOperand {
  Ahead at;
  int64_t share;  // bytes
  int64_t tiles;  // of a panel

  template <class P>
  FR_INLINE NextOperand(const P& in, int64_t first, int64_t share, int64_t tiles)
      : at(in.ahead(first)), share(in.ahead(share).first - in.ahead(0).first), tiles(tiles) {}

  FR_INLINE Ahead of(int64_t panel, int64_t tile) const {
    const int64_t bytes = (panel * tiles + tile) * share;
    return {at.first + bytes, at.second + bytes};
  }
};

// Where a tile's rows are. An address may add one register times 1, 2 or 4 to another, so five
// registers reach fourteen rows; the compiler would keep one for each row, and has too few.
template <class T>
class RowAddresses {
 public:
  FR_INLINE RowAddresses(const T* first, int64_t step)
      : first_(first), eighth_(first + 7 * step), step1_(step), step3_(3 * step), step5_(5 * step) {
    // Hides that these are multiples, from which the compiler would make a register for each row
    // again.
    asm("" : "+r"(eighth_), "+r"(step3_), "+r"(step5_));
  }

  // Row i, a constant after unrolling.
  FR_INLINE const T* row(int i) const {
    const T* const first = i < 7 ? first_ : eighth_;
    switch (i % 7) {
      case 0:
        return first;
      case 1:
        return first + step1_;
      case 2:
        return first + 2 * step1_;
      case 3:
        return first + step3_;
      case 4:
        return first + 4 * step1_;
      case 5:
        return first + step5_;
      default:
        return first + 2 * step3_;
    }
  }

  FR_INLINE void advance(int64_t elements) {
    first_ += elements;
    eighth_ += elements;
  }

 private:
  const T *first_, *eighth_;
  int64_t step1_, step3_, step5_;
};

// kRows pixels by kVecs vectors: x in rows `step` apart, w a panel. The pixels' vectors begin at
// elements at[i] + q of the result.
template <int kRows, int kVecs, class M, class E>
__attribute__((noinline)) void product_tile(const Element<M>* x, int64_t step, int64_t depth,
                                            const Element<M>* w, Ahead ahead, const E& e,
                                            const int64_t* at, int64_t q, bool pivot) {
  using A = typename M::A;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t steps = depth / M::kTerms;
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) e.prefetch(at[i] + q);
  Vec<A> acc[kVecs][kRows];
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) acc[v][i] = Vec<A>{};
  // The sum so far, where the depth is more than one chain of additions.
  Vec<A> far[kVecs][kRows];
  RowAddresses<Element<M>> rows(x, step);
  for (int64_t left = steps; left > 0; left -= kChain) {
    const int64_t length = min_of(left, kChain);
    for (int64_t d = 0; d < length; ++d, rows.advance(M::kTerms), w += kVecs * kWords<M>) {
      __builtin_prefetch(ahead.first, 0, 2);
      __builtin_prefetch(ahead.second, 0, 2);
      ahead.first += kAheadBytes;
      ahead.second += kAheadBytes;
      typename M::Word weight[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) weight[v] = M::words(w + v * kWords<M>);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        const typename M::Word value = M::spread(rows.row(i));
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[v][i] = M::add(acc[v][i], value, weight[v]);
      }
    }
    if (steps <= kChain) break;
    const bool first = left == steps, last = left <= kChain;
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        if (!first) acc[v][i] += far[v][i];
        if (last) continue;
        far[v][i] = acc[v][i];
        acc[v][i] = Vec<A>{};
      }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    const int64_t c = q + v * lanes;
    auto channel = e.channel(c);
    if (pivot) {
      Vec<A> sum = acc[v][0];
#pragma GCC unroll 14
      for (int i = 1; i < kRows; ++i) sum += acc[v][i];
      e.pivot(sum * (A(1) / kRows), channel);
    }
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) e.put(acc[v][i], at[i] + c, channel);
    e.done(channel, c);
  }
}

// All pixels of a block by one panel.
template <int kVecs, class M, class E>
FR_INLINE void product_panel(int64_t count, const Element<M>* x, int64_t step, int64_t depth,
                             const Element<M>* w, const NextOperand& next, int64_t panel,
                             const E& e, const int64_t* at, int64_t q, bool pivot) {
  constexpr int kHalf = kTilePixels / 2;
  int64_t i = 0;
  const auto ahead = [&] { return next.of(panel, i / kTilePixels); };
  for (; i + kTilePixels <= count; i += kTilePixels)
    product_tile<kTilePixels, kVecs, M>(x + i * step, step, depth, w, ahead(), e, at + i, q,
                                        pivot && i == 0);
  for (; i + kHalf <= count; i += kHalf)
    product_tile<kHalf, kVecs, M>(x + i * step, step, depth, w, ahead(), e, at + i, q,
                                  pivot && i == 0);
  for (; i < count; ++i)
    product_tile<1, kVecs, M>(x + i * step, step, depth, w, ahead(), e, at + i, q, pivot && i == 0);
}

// Columns [q0, q1) of the product of a block of pixels, whose rows lie at x; the first panel's
// share of what is prefetched is `panel`. A function of its own, as its callers are compiled for
// each prologue too.
template <class M, class E>
__attribute__((noinline)) void product_columns(int64_t count, const Element<M>* x, int64_t step,
                                               int64_t depth, const Element<M>* weight, int64_t q0,
                                               int64_t q1, const NextOperand& next, int64_t panel,
                                               const E& e, const int64_t* at, bool pivot) {
  constexpr int64_t width = kPanelWidth<typename M::A>;
  for (int64_t q = q0; q < q1; q += width, ++panel) {
    const Element<M>* w = weight + q * depth;
    if (q + width <= q1) {
      product_panel<2, M>(count, x, step, depth, w, next, panel, e, at, q, pivot);
    } else {
      product_panel<1, M>(count, x, step, depth, w, next, panel, e, at, q, pivot);
    }
  }
}

// How a grid's product is cut: into blocks that threads share, of at most kMostRows pixels, and
// these into chunks whose rows fit the L2 cache.
struct ProductPlan {
  int64_t rows, chunk;

  // More blocks for more threads, unless each of them reads a weight that fits no L2 cache.
  ProductPlan(int64_t pixels, int64_t depth, int64_t weight_bytes, int64_t element) {
    const int64_t wanted = weight_bytes > (1 << 20) ? 8 : 16;
    // A multiple of that, so that threads can take equal numbers of blocks.
    const int64_t blocks = wanted * max_of(ceil_div(pixels, wanted * kMostRows), 1);
    rows = max_of(ceil_div(ceil_div(pixels, blocks), kTilePixels), 2) * kTilePixels;
    const int64_t fit = kOperandBytes / (row_elements(depth, element) * element);
    chunk = min_of(max_of(fit / kTilePixels * kTilePixels, 2 * kTilePixels), rows);
  }

  int64_t blocks(int64_t pixels) const { return ceil_div(pixels, rows); }
  static int64_t row_elements(int64_t depth, int64_t element) {
    return depth + kLineBytes / element;
  }
};

// A block's scratch: near sums, numbers of pixels, and a chunk's rows.
template <class M>
struct ProductScratch {
  using A = typename M::A;
  A* near;
  int64_t *from, *at;
  Element<M>* rows;

  ProductScratch(void* scratch, int64_t sums) {
    near = static_cast<A*>(scratch);
    from = reinterpret_cast<int64_t*>(near + ceil_div(sums, 16) * 16);
    at = from + kMostRows;
    rows = reinterpret_cast<Element<M>*>(at + kMostRows);
  }

  static int64_t bytes(int64_t sums, int64_t rows, int64_t elements) {
    return static_cast<int64_t>(sizeof(A)) * ceil_div(sums, 16) * 16 + kBytes<M> * rows * elements +
           2 * kMostRows * static_cast<int64_t>(sizeof(int64_t));
  }
};

// Pixels [p0, p0 + count) of a grid as the operand's rows, `step` apart, tap by tap.
template <class M, class P>
__attribute__((noinline)) void copy_taps(const P& in, int64_t channels, const Grid& grid,
                                         int64_t p0, int64_t count, int64_t* from, Element<M>* rows,
                                         int64_t step) {
  for (int64_t t = 0; t < grid.taps(); ++t, rows += channels) {
    grid.sources(t / grid.x.taps, t % grid.x.taps, p0, count, from);
    copy_channels<M>(in, from, count, channels, 0, channels, rows, step);
  }
}

// Pixels [begin, end) of a grid: e gets conv(in) where `weight` holds panels of the grid's taps.
template <class M, class P, class E>
FR_INLINE void product_block(const P& in, int64_t channels, const Grid& grid,
                             const Element<M>* weight, int64_t columns, int64_t begin, int64_t end,
                             int64_t chunk, const ProductScratch<M>& scratch, const E& e) {
  using A = typename M::A;
  const int64_t taps = grid.taps(), depth = taps * channels;
  const int64_t step = ProductPlan::row_elements(depth, kBytes<M>);
  const bool in_order = taps == 1 && grid.y.move == 1 && grid.x.move == 1;
  e.begin();
  for (int64_t p0 = begin; p0 < end; p0 += chunk) {
    const int64_t count = min_of(chunk, end - p0);
    copy_taps<M>(in, channels, grid, p0, count, scratch.from, scratch.rows, step);
    grid.places(p0, count, scratch.at);
    for (int64_t i = 0; i < count; ++i) scratch.at[i] *= columns;
    // The next chunk's pixels, spread evenly over this one's tiles.
    const int64_t tiles = ceil_div(count, kTilePixels);
    const int64_t share = count * channels * kPanelWidth<A> / (tiles * columns);
    const NextOperand next(in, in_order ? (p0 + count) * channels : 0, in_order ? share : 0, tiles);
    product_columns<M>(count, scratch.rows, step, depth, weight, 0, columns, next, 0, e, scratch.at,
                       p0 == begin);
  }
  e.fold();
}

// The same where no tap reaches the grid's pixels, as between those of a 1x1 of stride 2: stores
// zeros, a pixel at a time.
template <class M, class E>
FR_INLINE void empty_block(const Grid& grid, int64_t columns, int64_t begin, int64_t end,
                           int64_t chunk, const ProductScratch<M>& scratch, const E& e) {
  e.begin();
  for (int64_t p0 = begin; p0 < end; p0 += chunk) {
    const int64_t count = min_of(chunk, end - p0);
    grid.places(p0, count, scratch.at);
    for (int64_t i = 0; i < count; ++i) e.put_zeros(scratch.at[i] * columns, columns);
  }
  e.fold();
}

}  // namespace FR_ISA
}  // namespace fr
