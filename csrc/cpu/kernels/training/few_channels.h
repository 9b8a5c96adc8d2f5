// The weight gradient where the input has few channels, as in a network's input images.
//
// Under one row of the kernel, a pixel's terms lie side by side in the input: kw * c of them, 21
// for a 7x7 of three channels, and those of the next pixel stride * c elements further on. So a row
// of the input is copied once, with its padding of zeros, and read in place: a tile adds up the
// products of 7 terms and two vectors of dz's channels (one with 16 registers) along a row of
// pixels.
//
// Work is cut by rows of the result. Each block computes a dw of its own; these are added in order.
#pragma once

#include "direct_weight.h"

namespace fr {
namespace FR_ISA {

constexpr int kTermRows = 7;
constexpr int kTermVecs = FR_VECTOR_BYTES == 64 ? 2 : 1;

constexpr int64_t kRowPixels = kChain;  // that are added up in registers

// Terms of a row of the kernel, in whole tiles; what is more than kw * c is dropped.
FR_INLINE int64_t row_terms(const ConvShape& s) {
  return ceil_div(s.kw * s.c, kTermRows) * kTermRows;
}

template <class A>
bool few_channels_fit(const ConvShape& s) {
  const bool few = s.groups == 1 && s.c <= 4 && s.kw * s.c >= 2 * kTermRows - 2;
  return few && s.k % kLanes<A> == 0 && s.dilation_h == 1 && s.dilation_w == 1;
}

// Sixteen blocks of rows, if there are that many rows.
struct RowPlan {
  int64_t rows, each, parts;

  explicit RowPlan(const ConvShape& s) : rows(s.n * s.out_h()) {
    each = max_of(ceil_div(rows, 16), 1);
    parts = max_of(ceil_div(rows, each), 1);
  }
};

inline int64_t few_channels_parts(const ConvShape& s) { return RowPlan(s).parts; }

// A block's scratch: sums [kh][row_terms][k], dz [k / panel][pixel][panel], and a row of the input.
template <class A>
struct RowScratch {
  A *sums, *dz, *x;
  int64_t* from;

  RowScratch(const ConvShape& s, void* memory)
      : sums(static_cast<A*>(memory)),
        dz(sums + s.kh * row_terms(s) * s.k),
        x(dz + kRowPixels * s.k),
        from(reinterpret_cast<int64_t*>(x + ceil_div(row_elements(s), 16) * 16)) {}

  static int64_t row_elements(const ConvShape& s) {
    return (kRowPixels - 1) * s.stride_w * s.c + row_terms(s);
  }
  static int64_t bytes(const ConvShape& s) {
    const int64_t elements = s.kh * row_terms(s) * s.k + kRowPixels * s.k;
    return static_cast<int64_t>(sizeof(A)) * (elements + ceil_div(row_elements(s), 16) * 16) +
           kRowPixels * static_cast<int64_t>(sizeof(int64_t));
  }
};

template <class A>
int64_t few_channels_scratch(const ConvShape& s) {
  return RowScratch<A>::bytes(s);
}

// Elements [first, first + count) of a row of w * c of them, through the prologue; zeros outside.
template <class T>
FR_INLINE void copy_row(const TrainingBackward& f, const T* row, int64_t first, int64_t count,
                        Acc<T>* to) {
  using A = Acc<T>;
  const int64_t c = f.shape.c, begin = min_of(max_of(-first, 0), count);
  const int64_t end = max_of(min_of(f.shape.w * c - first, count), begin);
  for (int64_t i = 0; i < begin; ++i) to[i] = 0;
  for (int64_t i = begin; i < end; ++i) to[i] = to_acc(row[first + i]);
  for (int64_t i = end; i < count; ++i) to[i] = 0;
  if (f.x_scale == nullptr) return;
  const A *scale = static_cast<const A*>(f.x_scale), *shift = static_cast<const A*>(f.x_shift);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t channel = (first + i) % c;
    const A v = to[i] * scale[channel] + shift[channel];
    to[i] = 0 > v ? 0 : v;
  }
}

// kTermRows rows of `to`, kVecs vectors each, += the products of a chain of pixels: of terms `step`
// elements apart at x, with vectors of dz one after the other.
template <int kVecs, class A>
__attribute__((noinline)) void add_term_products(const A* x, int64_t step, const A* dz,
                                                 int64_t count, A* to, int64_t to_step) {
  Vec<A> sum[kTermRows][kVecs];
#pragma GCC unroll 7
  for (int i = 0; i < kTermRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec<A>{};
  add_products<kTermRows, kVecs, SingleTerms<A>>(sum, x, step, dz, count);
  add_to_rows<kTermRows, kVecs, A>(sum, to, to_step, false);
}

template <class T>
void few_channels_weight_gradient(const TrainingBackward& f, int64_t block, void* memory) {
  using A = Acc<T>;
  using M = SingleTerms<A>;
  constexpr int64_t lanes = kLanes<A>, panel = kTermVecs * lanes;
  const ConvShape& s = f.shape;
  const RowPlan plan(s);
  const RowScratch<A> scratch(s, memory);
  const int64_t terms = row_terms(s), out_h = s.out_h(), out_w = s.out_w(), depth = s.kw * s.c;
  for (int64_t i = 0; i < s.kh * terms * s.k; ++i) scratch.sums[i] = 0;
  // Calls visit(vectors, k) for each panel of dz's channels.
  const auto for_panels = [&](auto visit) {
    int64_t k = 0;
    for (; k + panel <= s.k; k += panel) visit(Constant<kTermVecs>{}, k);
    for (; k < s.k; k += lanes) visit(Constant<1>{}, k);
  };
  const int64_t end = min_of((block + 1) * plan.each, plan.rows);
  with_gradient<T>(f, [&](const auto& gradient) {
    for (int64_t row = block * plan.each; row < end; ++row) {
      const T* image = static_cast<const T*>(f.x) + row / out_h * s.h * s.w * s.c;
      for (int64_t ox = 0; ox < out_w; ox += kRowPixels) {
        const int64_t count = min_of(kRowPixels, out_w - ox);
        for (int64_t i = 0; i < count; ++i) scratch.from[i] = row * out_w + ox + i;
        for_panels([&](auto vectors, int64_t k) {
          copy_words<vectors.value, M>(gradient, scratch.from, count, s.k, k,
                                       scratch.dz + k * kRowPixels);
        });
        for (int64_t ty = 0; ty < s.kh; ++ty) {
          const int64_t y = row % out_h * s.stride_h - s.pad_h + ty;
          if (y < 0 || y >= s.h) continue;
          const int64_t elements = (count - 1) * s.stride_w * s.c + terms;
          copy_row(f, image + y * s.w * s.c, (ox * s.stride_w - s.pad_w) * s.c, elements,
                   scratch.x);
          for_panels([&](auto vectors, int64_t k) {
            for (int64_t t = 0; t < terms; t += kTermRows) {
              add_term_products<vectors.value>(scratch.x + t, s.stride_w * s.c,
                                               scratch.dz + k * kRowPixels, count,
                                               scratch.sums + (ty * terms + t) * s.k + k, s.k);
            }
          });
        }
      }
    }
  });
  A* dw = static_cast<A*>(f.dw) + block * s.k * s.depth();
  for (int64_t k = 0; k < s.k; ++k)
    for (int64_t ty = 0; ty < s.kh; ++ty)
      for (int64_t t = 0; t < depth; ++t) *dw++ = scratch.sums[(ty * terms + t) * s.k + k];
}

// The other directions are inference's forward and PyTorch's data gradient.
template <class T>
constexpr TrainingConv few_channels_of() {
  using A = Acc<T>;
  TrainingConv conv{};
  conv.fits = few_channels_fit<A>;
  conv.weight_gradient = {few_channels_parts, few_channels_scratch<A>, few_channels_parts, nullptr,
                          few_channels_weight_gradient<T>};
  return conv;
}

}  // namespace FR_ISA
}  // namespace fr
