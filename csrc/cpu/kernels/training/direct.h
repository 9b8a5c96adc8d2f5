// Training convolutions as plain sums, in all three directions: 1x1 of any stride, 3x3 of stride 2,
// and any other kernel whose channels are whole vectors. See direct_product.h for the forward and
// the data gradient, direct_weight.h for the weight gradient.
//
// A weight is packed in panels of two vectors of result channels (one, for the last, where they do
// not come out even): forward [k / panel][kh][kw][c][panel], data gradient for each class of pixels
// [c / panel][taps][k][panel]. Where a step multiplies a pair of terms (direct_terms.h), the two
// are adjacent, in an innermost dimension after the panel's channel.
#pragma once

#include "direct_product.h"
#include "direct_weight.h"

namespace fr {
namespace FR_ISA {

template <class M>
bool direct_fits(const ConvShape& s) {
  const bool dilated = s.dilation_h > 1 || s.dilation_w > 1;
  return whole_vectors<M>(s) && !(dilated && s.stride_h * s.stride_w > 1);
}

template <class M>
int64_t direct_packed_bytes(const ConvShape& s) {
  return s.k * s.depth() * kBytes<M>;
}

// Panels of result channels of the side that has fewer; both packings have at least this many.
template <class A>
int64_t direct_pack_units(const ConvShape& s) {
  return min_of(ceil_div(s.k, kPanelWidth<A>), ceil_div(s.c, kPanelWidth<A>));
}

// Panels [begin, end) of `units` shares of `panels`.
FR_INLINE int64_t panel_at(int64_t unit, int64_t units, int64_t panels) {
  return unit * panels / units;
}

template <class T, class M>
void direct_pack_forward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                         void* packed) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const T* w = static_cast<const T*>(weight);
  const int64_t depth = s.depth(), panels = ceil_div(s.k, width), units = direct_pack_units<A>(s);
  for (int64_t p = panel_at(begin, units, panels); p < panel_at(end, units, panels); ++p) {
    Element<M>* const panel = static_cast<Element<M>*>(packed) + p * width * depth;
    const int64_t columns = min_of(width, s.k - p * width);
    for (int64_t q = 0; q < columns; q += lanes) {
      for (int64_t d = 0; d < depth; d += kWords<M>) {
        M::transpose_words(w + (p * width + q) * depth + d, depth, [&](int64_t i) {
          return panel + d * columns + (i * columns + q) * M::kTerms;
        });
      }
    }
  }
}

template <class T, class M>
void direct_pack_backward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                          void* packed) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const T* w = static_cast<const T*>(weight);
  const int64_t panels = ceil_div(s.c, width), units = direct_pack_units<A>(s);
  Element<M>* to_class = static_cast<Element<M>*>(packed);
  for (int64_t i = 0; i < gradient_classes(s); ++i) {
    const Grid grid = gradient_grid(s, i);
    const int64_t depth = grid.taps() * s.k;
    for (int64_t p = panel_at(begin, units, panels); p < panel_at(end, units, panels); ++p) {
      Element<M>* to = to_class + p * width * depth;
      const int64_t columns = min_of(width, s.c - p * width);
      for (int64_t t = 0; t < grid.taps(); ++t) {
        const int64_t ty = grid.y.tap0 + t / grid.x.taps * grid.y.tap_step;
        const int64_t tx = grid.x.tap0 + t % grid.x.taps * grid.x.tap_step;
        for (int64_t k = 0; k < s.k; k += M::kTerms, to += columns * M::kTerms) {
          const T* from = w + ((k * s.kh + ty) * s.kw + tx) * s.c + p * width;
          for (int64_t q = 0; q < columns; q += lanes) {
            Vec<A> terms[M::kTerms];
            for (int64_t i = 0; i < M::kTerms; ++i)
              terms[i] = load(from + i * s.kh * s.kw * s.c + q);
            M::put_words(terms, to + q * M::kTerms);
          }
        }
      }
    }
    to_class += depth * s.c;
  }
}

// --- Forward. ------------------------------------------------------------------------------------

template <class M>
FR_INLINE ProductPlan forward_plan(const ConvShape& s) {
  return {s.n * s.out_h() * s.out_w(), s.depth(), direct_packed_bytes<M>(s), kBytes<M>};
}

template <class M>
int64_t direct_forward_blocks(const ConvShape& s) {
  return forward_plan<M>(s).blocks(s.n * s.out_h() * s.out_w());
}

template <class M>
int64_t direct_forward_pixels(const ConvShape& s, int64_t block) {
  const int64_t rows = forward_plan<M>(s).rows;
  return min_of(rows, s.n * s.out_h() * s.out_w() - block * rows);
}

template <class M>
int64_t direct_forward_scratch(const ConvShape& s) {
  return ProductScratch<M>::bytes(kStatisticsRows * s.k, forward_plan<M>(s).chunk,
                                  ProductPlan::row_elements(s.depth(), kBytes<M>));
}

template <class T, class M>
void direct_forward(const TrainingForward& f, int64_t block, void* memory) {
  const ConvShape& s = f.shape;
  const Grid grid = forward_grid(s);
  const ProductPlan plan = forward_plan<M>(s);
  const ProductScratch<M> scratch(memory, kStatisticsRows * s.k);
  const int64_t begin = block * plan.rows, end = min_of(begin + plan.rows, grid.pixels());
  with_input<T>(f, [&](const auto& in) {
    with_result<T>(f, block, scratch.near, [&](const auto& e) {
      product_block<M>(in, s.c, grid, static_cast<const Element<M>*>(f.weight), s.k, begin, end,
                       plan.chunk, scratch, e);
    });
  });
}

// --- Data gradient. ------------------------------------------------------------------------------

// Calls visit(class, grid, plan, the panels' offset).
template <class M, class Visit>
FR_INLINE void for_classes(const ConvShape& s, Visit visit) {
  int64_t offset = 0;
  for (int64_t i = 0; i < gradient_classes(s); ++i) {
    const Grid grid = gradient_grid(s, i);
    const int64_t depth = grid.taps() * s.k;
    visit(grid, ProductPlan(grid.pixels(), depth, depth * s.c * kBytes<M>, kBytes<M>), offset);
    offset += depth * s.c;
  }
}

template <class M>
int64_t direct_data_blocks(const ConvShape& s) {
  int64_t blocks = 0;
  for_classes<M>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t) {
    blocks += plan.blocks(grid.pixels());
  });
  return blocks;
}

template <class M>
int64_t direct_data_scratch(const ConvShape& s) {
  int64_t bytes = 0;
  for_classes<M>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t) {
    const int64_t elements = ProductPlan::row_elements(grid.taps() * s.k, kBytes<M>);
    bytes = max_of(bytes, ProductScratch<M>::bytes(kGradientRows * s.c, plan.chunk, elements));
  });
  return bytes;
}

template <class T, class M>
void direct_data_gradient(const TrainingBackward& f, int64_t block, void* memory) {
  const ConvShape& s = f.shape;
  const ProductScratch<M> scratch(memory, kGradientRows * s.c);
  int64_t first = 0;
  for_classes<M>(s, [&](const Grid& grid, const ProductPlan& plan, int64_t offset) {
    const int64_t blocks = plan.blocks(grid.pixels()), mine = block - first;
    first += blocks;
    if (mine < 0 || mine >= blocks) return;
    const int64_t begin = mine * plan.rows, end = min_of(begin + plan.rows, grid.pixels());
    if (grid.taps() == 0) {
      with_input_gradient<T>(f, block, scratch.near, [&](const auto& e) {
        empty_block<M>(grid, s.c, begin, end, plan.chunk, scratch, e);
      });
      return;
    }
    with_gradient<T>(f, [&](const auto& in) {
      with_input_gradient<T>(f, block, scratch.near, [&](const auto& e) {
        product_block<M>(in, s.k, grid, static_cast<const Element<M>*>(f.weight) + offset, s.c,
                         begin, end, plan.chunk, scratch, e);
      });
    });
  });
}

template <class T, class M = SingleTerms<Acc<T>>>
constexpr TrainingConv direct_of() {
  using A = Acc<T>;
  TrainingConv conv{};
  conv.fits = direct_fits<M>;
  conv.packed_bytes = direct_packed_bytes<M>;
  conv.pack_units = direct_pack_units<A>;
  conv.pack_forward = direct_pack_forward<T, M>;
  conv.pack_backward = direct_pack_backward<T, M>;
  conv.forward = {direct_forward_blocks<M>, direct_forward_scratch<M>, nullptr,
                  direct_forward_pixels<M>, direct_forward<T, M>};
  conv.data_gradient = {direct_data_blocks<M>, direct_data_scratch<M>, nullptr, nullptr,
                        direct_data_gradient<T, M>};
  conv.weight_gradient = {direct_weight_blocks, direct_weight_scratch<M>, direct_weight_parts,
                          nullptr, direct_weight_gradient<T, M>};
  conv.both_gradients = {direct_weight_blocks, direct_both_scratch<M>, direct_weight_parts, nullptr,
                         direct_both_gradients<T, M>};
  return conv;
}

}  // namespace FR_ISA
}  // namespace fr
