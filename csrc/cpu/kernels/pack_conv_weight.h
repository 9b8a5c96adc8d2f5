// Converts a convolution's weight from PyTorch's layout to that of conv_bn_add_relu.h, and back.
//
// Bytes: the weight read once and written once. Whole steps of the depth are transposed in
// registers, as squares of filters by depth; remainders are copied element by element.
#pragma once

#include "conv_bn_add_relu.h"
#include "transpose.h"

namespace fr {
namespace FR_ISA {

template <class T>
int64_t packed_numel(const ConvShape& s) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const int64_t group = packed_group<Acc<T>>(s);
  return s.k / group * ceil_div(group, lanes) * lanes * s.depth();
}

// Both directions traverse the filters of a panel together, one cache line of each at a time.
// Column by column, the lines of the filters would map to a few sets of the cache and evict each
// other.
constexpr int64_t kPackStep = 16;

// Calls visit(offset in packed, offset in weight, channels that exist, width of the panel, number
// of elements, packed row of each element) for every step. The filters are dense, in either format.
template <class A, class Visit>
FR_INLINE void visit_packed(const ConvShape& s, bool taps_inside, int64_t panel0, int64_t panel1,
                            Visit visit) {
  const int64_t panels = group_panels<A>(s), group_k = packed_group<A>(s);
  const int64_t taps = s.kh * s.kw, channels = s.group_c(), depth = s.depth();
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const int64_t k0 = panel % panels * kPanel<A>;
    const int64_t cols = min_of(group_k - k0, kPanel<A>), width = panel_width<A>(s, k0);
    const int64_t first = (panel / panels * group_k + k0) * depth;
    for (int64_t i = 0; i < depth; i += kPackStep) {
      const int64_t count = min_of(depth - i, kPackStep);
      int64_t rows[kPackStep];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = i + j;
        rows[j] = (taps_inside ? at % taps * channels + at / taps : at) * width;
      }
      visit(panel_offset<A>(s, panel), first + i, cols, width, count, rows);
    }
  }
}

// The same for groups that share vectors: visit(place in packed, place in weight) for every
// element.
template <class A, class Visit>
FR_INLINE void visit_shared(const ConvShape& s, bool taps_inside, int64_t panel0, int64_t panel1,
                            Visit visit) {
  const int64_t taps = s.kh * s.kw, share = s.group_c(), depth = s.depth();
  for (int64_t k = panel0 * kLanes<A>; k < panel1 * kLanes<A>; ++k) {
    const int64_t panel = k / kLanes<A> * kLanes<A> * depth;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < share; ++c) {
        visit(panel + tap * share * kLanes<A> + shared_at<A>(share, c, k % kLanes<A>),
              k * depth + (taps_inside ? c * taps + tap : tap * share + c));
      }
    }
  }
}

// `taps_inside`: the weight is (K, C, kh, kw) in memory; else (K, kh, kw, C), which is
// channels-last.
template <class T>
void pack(const ConvShape& s, bool taps_inside, const void* weight, int64_t panel0, int64_t panel1,
          void* packed) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(weight);
  A* p = static_cast<A*>(packed);
  const int64_t depth = s.depth();
  if (shared_channels<A>(s) > 0) {
    return visit_shared<A>(s, taps_inside, panel0, panel1,
                           [=](int64_t to, int64_t from) { p[to] = to_acc(w[from]); });
  }
  visit_packed<A>(s, taps_inside, panel0, panel1,
                  [=](int64_t to, int64_t from, int64_t cols, int64_t width, int64_t count,
                      const int64_t* rows) {
                    constexpr int64_t lanes = kLanes<A>;
                    const int64_t whole = count == kPackStep ? cols / lanes * lanes : 0;
                    for (int64_t k = 0; k < whole; k += lanes) {
                      for (int64_t j = 0; j < kPackStep; j += lanes) {
                        transpose_square<A>(
                            w + from + k * depth + j, depth,
                            [=](int64_t i, Vec<A> line) { store(line, p + to + rows[j + i] + k); });
                      }
                    }
                    for (int64_t k = whole; k < cols; ++k) {
                      for (int64_t j = 0; j < count; ++j)
                        p[to + rows[j] + k] = to_acc(w[from + k * depth + j]);
                    }
                    for (int64_t k = cols; k < width; ++k) {
                      for (int64_t j = 0; j < count; ++j) p[to + rows[j] + k] = 0;
                    }
                  });
}

template <class T>
void unpack(const ConvShape& s, const void* packed, void* weight) {
  using A = Acc<T>;
  const A* p = static_cast<const A*>(packed);
  A* w = static_cast<A*>(weight);
  const int64_t depth = s.depth();
  if (shared_channels<A>(s) > 0) {
    return visit_shared<A>(s, true, 0, all_panels<A>(s),
                           [=](int64_t from, int64_t to) { w[to] = p[from]; });
  }
  visit_packed<A>(
      s, true, 0, all_panels<A>(s),
      [=](int64_t from, int64_t to, int64_t cols, int64_t, int64_t count, const int64_t* rows) {
        for (int64_t k = 0; k < cols; ++k) {
          for (int64_t j = 0; j < count; ++j) w[to + k * depth + j] = p[from + rows[j] + k];
        }
      });
}

}  // namespace FR_ISA
}  // namespace fr
