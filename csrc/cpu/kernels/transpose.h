// Transposes a square of numbers in registers: as many vectors as a vector has lanes.
//
// log2(lanes) steps, each of which swaps the off-diagonal blocks of every pair of rows: lanes *
// log2(lanes) shuffles for lanes^2 numbers, a quarter of one for each on AVX-512.
#pragma once

#include "vec.h"

namespace fr {
namespace FR_ISA {

template <class A, int kStep>
FR_INLINE void swap_blocks(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  LaneIndex<A> low{}, high{};
#pragma GCC unroll 16
  for (int e = 0; e < lanes; ++e) {
    low[e] = e & kStep ? e - kStep + lanes : e;
    high[e] = e & kStep ? e + lanes : e + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & kStep) continue;
    const Vec<A> a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kStep > 1) swap_blocks<A, kStep / 2>(rows);
}

template <class A>
FR_INLINE void transpose(Vec<A> (&rows)[kLanes<A>]) {
  swap_blocks<A, kLanes<A> / 2>(rows);
}

// Transposes the square whose rows begin every `step` elements, and calls put(i, row) with the rows
// of the result.
template <class A, class T, class Put>
FR_INLINE void transpose_square(const T* from, int64_t step, Put put) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> square[lanes];
  for (int64_t i = 0; i < lanes; ++i) square[i] = load(from + i * step);
  transpose<A>(square);
  for (int64_t i = 0; i < lanes; ++i) put(i, square[i]);
}

}  // namespace FR_ISA
}  // namespace fr
