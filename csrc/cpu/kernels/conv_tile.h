// The microkernels of conv_bn_add_relu.h: the whole sum of a tile of output pixels by a panel of
// channels in registers, and the epilogue there.
//
// Tiling. tile x panel accumulators fill the registers: 14 x 32 floats on AVX-512 (28 of 32
// vectors, 2 for weights, 1 to broadcast a pixel), 6 x 16 on AVX2, 6 x 8 on SSE2. Per step along
// the depth, 14 broadcasts and 2 loads feed 28 multiply-adds, so two loads a cycle keep two FMA
// units busy. The widths of ResNet's maps, 112 to 7, are multiples of 14 or divide it. 6 divides
// none of them, but six pointers fit the registers: there a tile continues in the next row, and a
// 7x7 map is nine tiles rather than fourteen.
#pragma once

#include <utility>

#include "activation.h"
#include "conv_input.h"
#include "panels.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

template <class T>
struct Epilogue {
  const Acc<T>* scale;  // at the panel's first channel
  const Acc<T>* shift;
  const T* residual;  // at the tile's first element; null: none
  T* y;               // likewise
  int64_t stride;     // elements from one output pixel to the next
  int64_t cols;       // channels of the panel that exist
  Activation activation;
};

// Fetches pixel i's lines of the result and the residual, which arrive while the sum is computed.
template <class T>
FR_INLINE void prefetch_pixel(const Epilogue<T>& e, int64_t i, int64_t panel) {
  for (int64_t k = 0; k < panel; k += kLineBytes / static_cast<int64_t>(sizeof(T))) {
    const int64_t at = i * e.stride + k;
    if (e.residual) __builtin_prefetch(e.residual + at, 0, 3);
    __builtin_prefetch(e.y + at, 1, 3);
  }
}

// Stores a whole panel. The epilogue is passed by value and the branches are outside the loop:
// otherwise the compiler assumes that a store may alias the epilogue's fields and reloads them.
template <class A, bool kResidual, int kTile, int kVectors>
FR_INLINE void store_panel(Vec<A> (&acc)[kTile][kVectors], const Epilogue<A> e) {
  constexpr int lanes = kLanes<A>;
  const Vec<A> floor = activation_floor<A>(e.activation);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Vec<A> scale = load(e.scale + v * lanes), shift = load(e.shift + v * lanes);
    const A* residual = e.residual + v * lanes;
    A* y = e.y + v * lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i, residual += e.stride, y += e.stride) {
      Vec<A> r = acc[i][v] * scale + shift;
      if (kResidual) r += load(residual);
      store(floor_vector(floor, r), y);
    }
  }
}

// Stores the channels that exist of a panel's last, less than whole one; `values` are `tile` rows
// of `width`. A function of its own: in each of the microkernels it would be a third of the code.
template <class A>
__attribute__((noinline)) void store_part(const A* values, int64_t tile, int64_t width,
                                          const Epilogue<A>& e) {
  const A floor = activation_floor<A>(e.activation)[0];
  for (int64_t i = 0; i < tile; ++i) {
    for (int64_t k = 0; k < e.cols; ++k) {
      A r = values[i * width + k] * e.scale[k] + e.shift[k];
      const int64_t at = i * e.stride + k;
      if (e.residual) r += e.residual[at];
      e.y[at] = floor_vector(floor, r);
    }
  }
}

template <class A, int kTile, int kVectors>
FR_INLINE void store_tile(Vec<A> (&acc)[kTile][kVectors], const Epilogue<A>& e) {
  constexpr int lanes = kLanes<A>;
  if (e.cols == kVectors * lanes) {
    if (e.residual) {
      store_panel<A, true>(acc, e);
    } else {
      store_panel<A, false>(acc, e);
    }
    return;
  }
  A values[kTile][kVectors * lanes];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(acc[i][v], &values[i][v * lanes]);
  }
  store_part<A>(values[0], kTile, kVectors * lanes, e);
}

// The weights of a panel, and what to prefetch: every step prefetches the lines at `ahead`, of
// weights, and at `next`, of the next block's maps, and advances both.
template <class A>
struct Weights {
  const A* at;
  const A* ahead;
  int64_t ahead_step;
  const char* next;
  int64_t next_step;
};

// Forces the array into memory. Otherwise the compiler keeps it in registers and spills the
// operands of the inner loop instead.
template <class Array>
FR_INLINE void keep_in_memory(Array& array) {
  __asm__ volatile("" : : "r"(&array) : "memory");
}

// acc[i] = sum over the runs of pixel i's elements times the panel's weights. A chain of kChain
// additions is moved to `total` when it is complete.
template <class A, int kTile, int kVectors>
FR_INLINE void accumulate(const Pixels<A>& pixels, const Runs& runs, const Weights<A>& weights,
                          Vec<A> (&acc)[kTile][kVectors]) {
  constexpr int lanes = kLanes<A>;
  const A* b = weights.at;
  const A* ahead = weights.ahead;
  const char* next = weights.next;
  Vec<A> total[kTile][kVectors];
  keep_in_memory(total);
  // An initialiser would compile to a call of memset, which costs more than a short sum.
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Vec<A>{};
  }
  const A* at[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) at[i] = pixels.base + (kIndirect ? pixels.offset[i] : 0);
  const int64_t pixel = pixels.step;
  const auto multiply = [&](int64_t from, int64_t steps) __attribute__((always_inline)) {
    for (int64_t o = from; o < from + steps; ++o, b += kVectors * lanes) {
      __builtin_prefetch(ahead);
      __builtin_prefetch(next, 0, 2);
      ahead += weights.ahead_step;
      next += weights.next_step;
      Vec<A> w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = load(b + v * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const Vec<A> x = broadcast<A>(kIndirect ? at[i][o] : (at[0] + o)[i * pixel]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[i][v] += x * w[v];
      }
    }
  };
  // For 1x1 convolutions of few channels the loops below would be a measurable overhead.
  if (runs.rows * runs.per_row == 1 && runs.length <= kChain) return multiply(0, runs.length);
  int64_t chain = 0;
  bool spilled = false;
  for (int64_t r = 0; r < runs.rows; ++r) {
    for (int64_t tap = 0; tap < runs.per_row; ++tap) {
      int64_t o = r * runs.row_step + tap * runs.col_step;
      for (int64_t left = runs.length; left > 0;) {
        if (chain == kChain) {
#pragma GCC unroll 16
          for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              total[i][v] = spilled ? total[i][v] + acc[i][v] : acc[i][v];
              acc[i][v] = Vec<A>{};
            }
          }
          spilled = true;
          chain = 0;
        }
        const int64_t steps = min_of(left, kChain - chain);
        chain += steps;
        left -= steps;
        multiply(o, steps);
        o += steps;
      }
    }
  }
  if (spilled) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] += total[i][v];
    }
  }
}

// The tiles of groups that share vectors: a pixel has kShare / 2 sums and its own vector in
// registers, and one more holds a weight.
template <int kShare>
constexpr int kSharedTile = ((FR_VECTOR_BYTES == 64 ? 32 : 16) - 1) / (kShare / 2 + 1);

// The same for groups of kShare channels, several of which share a vector: see panels.h.
template <class A, int kTile, int kShare>
FR_INLINE void accumulate_shared(const Pixels<A>& pixels, const Runs& runs,
                                 const Weights<A>& weights, Vec<A> (&acc)[kTile][1]) {
  constexpr int lanes = kLanes<A>, turns = kShare / 2;
  Vec<A> sum[turns][kTile];
#pragma GCC unroll 4
  for (int t = 0; t < turns; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) sum[t][i] = Vec<A>{};
  }
  const A* b = weights.at;
  const auto multiply = [&](const A* at, auto odd) __attribute__((always_inline)) {
    Vec<A> x[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
      x[i] = load_twice<odd.value>(at + (kIndirect ? pixels.offset[i] : i * pixels.step));
#pragma GCC unroll 4
    for (int t = 0; t < turns; ++t, b += lanes) {
      const Vec<A> w = load(b);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) sum[t][i] += x[i] * w;
    }
  };
  for (int64_t r = 0; r < runs.rows; ++r) {
    for (int64_t tap = 0; tap < runs.per_row; ++tap) {
      const A* at = pixels.base + r * runs.row_step + tap * runs.col_step;
      multiply(at, Constant<0>{});
      multiply(at, Constant<1>{});
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < turns; ++t) {
    LaneIndex<A> turned;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      turned[i] = i / kShare * kShare + (i % kShare + kShare - 2 * t) % kShare;
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const Vec<A> part = __builtin_shuffle(sum[t][i], turned);
      acc[i][0] = t == 0 ? part : acc[i][0] + part;
    }
  }
}

// kShare: channels per group if several groups share a vector, else 0.
template <class A, int kTile, int kVectors, int kShare>
void conv_tile(const Pixels<A>& pixels, const Runs& runs, const Weights<A>& weights,
               const Epilogue<A>& e) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) prefetch_pixel(e, i, kVectors * kLanes<A>);
  Vec<A> acc[kTile][kVectors];
  if constexpr (kShare > 0) {
    accumulate_shared<A, kTile, kShare>(pixels, runs, weights, acc);
  } else {
    accumulate<A, kTile, kVectors>(pixels, runs, weights, acc);
  }
  store_tile(acc, e);
}

template <class A>
using ConvTile = void (*)(const Pixels<A>&, const Runs&, const Weights<A>&, const Epilogue<A>&);

template <class A, int kVectors, int kShare, int... kFewer>
ConvTile<A> tile_of(int64_t pixels, std::integer_sequence<int, kFewer...>) {
  static constexpr ConvTile<A> tiles[] = {conv_tile<A, kFewer + 1, kVectors, kShare>...};
  return tiles[pixels - 1];
}

// The most pixels of a tile; `share` is the result of shared_channels.
template <class A>
FR_INLINE int64_t most_pixels(int64_t share) {
  return share == 8 ? kSharedTile<8> : share == 4 ? kSharedTile<4> : kMostPixels<A>;
}

// The microkernel for a number of pixels and a panel of `width` channels.
template <class A>
ConvTile<A> tile_for(int64_t share, int64_t width, int64_t pixels) {
  if constexpr (kLanes<A> > 8) {
    if (share == 8)
      return tile_of<A, 1, 8>(pixels, std::make_integer_sequence<int, kSharedTile<8>>());
  }
  if constexpr (kLanes<A> > 4) {
    if (share == 4)
      return tile_of<A, 1, 4>(pixels, std::make_integer_sequence<int, kSharedTile<4>>());
  }
  constexpr std::make_integer_sequence<int, kMostPixels<A>> all;
  return width == kPanel<A> ? tile_of<A, kPanelVectors, 0>(pixels, all)
                            : tile_of<A, 1, 0>(pixels, all);
}

// The rest of the epilogue where the result is narrower than its sums: `values` are rows of a panel
// in float32, scaled and shifted.
template <class T>
__attribute__((noinline)) void narrow_tile(const float* values, int64_t pixels,
                                           const Epilogue<T> e) {
  constexpr int64_t lanes = kLanes<float>;
  const Vec<float> floor = activation_floor<float>(e.activation);
  for (int64_t i = 0; i < pixels; ++i, values += kPanel<float>) {
    const T* const residual = e.residual + i * e.stride;
    T* const y = e.y + i * e.stride;
    int64_t k = 0;
    for (; k + lanes <= e.cols; k += lanes) {
      Vec<float> r = load(values + k);
      if (e.residual) r += load(residual + k);
      store(floor_vector(floor, r), y + k);
    }
#pragma GCC unroll 1
    for (; k < e.cols; ++k) {
      float r = values[k];
      if (e.residual) r += to_acc(residual[k]);
      from_acc(floor_vector(floor[0], r), y + k);
    }
  }
}

// The sum and the epilogue of `count` pixels by a panel of `width` channels. The 16-bit types share
// the microkernels of float32, as others for them would triple the machine code: their tile goes
// through a buffer in the L1 cache, from which narrow_tile stores it.
template <class T>
FR_INLINE void run_tile(int64_t share, int64_t width, int64_t count, const Pixels<Acc<T>>& pixels,
                        const Runs& runs, const Weights<Acc<T>>& weights, const Epilogue<T>& e) {
  using A = Acc<T>;
  const ConvTile<A> tile = tile_for<A>(share, width, count);
  if constexpr (sizeof(T) == sizeof(A)) {
    tile(pixels, runs, weights, e);
  } else {
    A values[kMaxTile * kPanel<A>];
    for (int64_t i = 0; i < count; ++i) prefetch_pixel(e, i, width);
    tile(pixels, runs, weights,
         {e.scale, e.shift, nullptr, values, kPanel<A>, e.cols, Activation::kNone});
    narrow_tile<T>(values, count, e);
  }
}

}  // namespace FR_ISA
}  // namespace fr
