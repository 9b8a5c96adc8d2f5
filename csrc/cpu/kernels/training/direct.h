// Training convolutions as plain sums, in all three directions: 1x1 of any stride, 3x3 of stride 2,
// and any other kernel whose channels are whole vectors. See direct_product.h for the forward and
// the data gradient, direct_weight.h for the weight gradient.
//
// A weight is packed in panels of two vectors of result channels (one, for the last, where they do
// not come out even): forward [k / panel][kh][kw][c][panel], data gradient for each class of pixels
// [c / panel][taps][k][panel].
#pragma once

#include "../transpose.h"
#include "direct_product.h"
#include "direct_weight.h"

namespace fr {
namespace FR_ISA {

template <class A>
bool direct_fits(const ConvShape& s) {
  const bool dilated = s.dilation_h > 1 || s.dilation_w > 1;
  return whole_vectors<A>(s) && !(dilated && s.stride_h * s.stride_w > 1);
}

template <class A>
int64_t direct_packed_bytes(const ConvShape& s) {
  return s.k * s.depth() * static_cast<int64_t>(sizeof(A));
}

// Vectors of result channels of the smaller side; both packings have at least so many.
template <class A>
int64_t direct_pack_units(const ConvShape& s) {
  return min_of(ceil_div(s.k, kPanelWidth<A>), ceil_div(s.c, kPanelWidth<A>));
}

// Panels [begin, end) of `units` shares of `panels`.
FR_INLINE int64_t panel_at(int64_t unit, int64_t units, int64_t panels) {
  return unit * panels / units;
}

template <class T>
void direct_pack_forward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                         void* packed) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const T* w = static_cast<const T*>(weight);
  const int64_t depth = s.depth(), panels = ceil_div(s.k, width), units = direct_pack_units<A>(s);
  for (int64_t p = panel_at(begin, units, panels); p < panel_at(end, units, panels); ++p) {
    A* const panel = static_cast<A*>(packed) + p * width * depth;
    const int64_t columns = min_of(width, s.k - p * width);
    for (int64_t q = 0; q < columns; q += lanes) {
      for (int64_t d = 0; d < depth; d += lanes) {
        transpose_square<A>(w + (p * width + q) * depth + d, depth,
                            [&](int64_t i, Vec<A> v) { store(v, panel + (d + i) * columns + q); });
      }
    }
  }
}

template <class T>
void direct_pack_backward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                          void* packed) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const T* w = static_cast<const T*>(weight);
  const int64_t panels = ceil_div(s.c, width), units = direct_pack_units<A>(s);
  A* to_class = static_cast<A*>(packed);
  for (int64_t i = 0; i < gradient_classes(s); ++i) {
    const Grid grid = gradient_grid(s, i);
    const int64_t depth = grid.taps() * s.k;
    for (int64_t p = panel_at(begin, units, panels); p < panel_at(end, units, panels); ++p) {
      A* to = to_class + p * width * depth;
      const int64_t columns = min_of(width, s.c - p * width);
      for (int64_t t = 0; t < grid.taps(); ++t) {
        const int64_t ty = grid.y.tap0 + t / grid.x.taps * grid.y.tap_step;
        const int64_t tx = grid.x.tap0 + t % grid.x.taps * grid.x.tap_step;
        for (int64_t k = 0; k < s.k; ++k, to += columns) {
          const T* from = w + ((k * s.kh + ty) * s.kw + tx) * s.c + p * width;
          for (int64_t q = 0; q < columns; q += lanes) store(load(from + q), to + q);
        }
      }
    }
    to_class += depth * s.c;
  }
}

// --- Forward. ------------------------------------------------------------------------------------

template <class A>
FR_INLINE ProductPlan forward_plan(const ConvShape& s) {
  return {s.n * s.out_h() * s.out_w(), s.depth(), direct_packed_bytes<A>(s), sizeof(A)};
}

template <class A>
int64_t direct_forward_blocks(const ConvShape& s) {
  return forward_plan<A>(s).blocks(s.n * s.out_h() * s.out_w());
}

template <class A>
int64_t direct_forward_pixels(const ConvShape& s, int64_t block) {
  const int64_t rows = forward_plan<A>(s).rows;
  return min_of(rows, s.n * s.out_h() * s.out_w() - block * rows);
}

template <class A>
int64_t direct_forward_scratch(const ConvShape& s) {
  return ProductScratch<A>::bytes(kStatisticsRows * s.k, forward_plan<A>(s).chunk,
                                  ProductPlan::row_elements(s.depth(), sizeof(A)));
}

template <class T>
void direct_forward(const TrainingForward& f, int64_t block, void* memory) {
  using A = Acc<T>;
  const ConvShape& s = f.shape;
  const Grid grid = forward_grid(s);
  const ProductPlan plan = forward_plan<A>(s);
  const ProductScratch<A> scratch(memory, kStatisticsRows * s.k);
  const int64_t begin = block * plan.rows, end = min_of(begin + plan.rows, grid.pixels());
  with_input<T>(f, [&](const auto& in) {
    with_result<T>(f, block, scratch.near, [&](const auto& e) {
      product_block(in, s.c, grid, static_cast<const A*>(f.weight), s.k, begin, end, plan.chunk,
                    scratch, e);
    });
  });
}

// --- Data gradient. ------------------------------------------------------------------------------

// Calls visit(class, grid, plan, the panels' offset).
template <class A, class Visit>
FR_INLINE void for_classes(const ConvShape& s, Visit visit) {
  int64_t offset = 0;
  for (int64_t i = 0; i < gradient_classes(s); ++i) {
    const Grid grid = gradient_grid(s, i);
    const int64_t depth = grid.taps() * s.k;
    visit(
        grid,
        ProductPlan(grid.pixels(), depth, depth * s.c * static_cast<int64_t>(sizeof(A)), sizeof(A)),
        offset);
    offset += depth * s.c;
  }
}

template <class A>
int64_t direct_data_blocks(const ConvShape& s) {
  int64_t blocks = 0;
  for_classes<A>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t) {
    blocks += plan.blocks(grid.pixels());
  });
  return blocks;
}

template <class A>
int64_t direct_data_scratch(const ConvShape& s) {
  int64_t bytes = 0;
  for_classes<A>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t) {
    const int64_t elements = ProductPlan::row_elements(grid.taps() * s.k, sizeof(A));
    bytes = max_of(bytes, ProductScratch<A>::bytes(kGradientRows * s.c, plan.chunk, elements));
  });
  return bytes;
}

template <class T>
void direct_data_gradient(const TrainingBackward& f, int64_t block, void* memory) {
  using A = Acc<T>;
  const ConvShape& s = f.shape;
  const ProductScratch<A> scratch(memory, kGradientRows * s.c);
  int64_t first = 0;
  for_classes<A>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t offset) {
    const int64_t blocks = plan.blocks(grid.pixels()), mine = block - first;
    first += blocks;
    if (mine < 0 || mine >= blocks) return;
    const int64_t begin = mine * plan.rows, end = min_of(begin + plan.rows, grid.pixels());
    with_gradient<T>(f, [&](const auto& in) {
      with_input_gradient<T>(f, block, scratch.near, [&](const auto& e) {
        product_block(in, s.k, grid, static_cast<const A*>(f.weight) + offset, s.c, begin, end,
                      plan.chunk, scratch, e);
      });
    });
  });
}

template <class T>
constexpr TrainingConv direct_of() {
  using A = Acc<T>;
  return {
      direct_fits<A>,
      direct_packed_bytes<A>,
      direct_pack_units<A>,
      direct_pack_forward<T>,
      direct_pack_backward<T>,
      {direct_forward_blocks<A>, direct_forward_scratch<A>, nullptr, direct_forward_pixels<A>,
       direct_forward<T>},
      {direct_data_blocks<A>, direct_data_scratch<A>, nullptr, nullptr, direct_data_gradient<T>},
      {direct_weight_blocks<A>, direct_weight_scratch<A>, direct_weight_parts<A>, nullptr,
       direct_weight_gradient<T>},
      {direct_weight_blocks<A>, direct_both_scratch<A>, direct_weight_parts<A>, nullptr,
       direct_both_gradients<T>}};
}

}  // namespace FR_ISA
}  // namespace fr
