// How a convolution's weight is cut: panels of output channels, for the microkernels of
// conv_bn_add_relu.h and winograd.h.
//
// Weights are packed [group][panel of output channels][r][s][c][panel]. Where a vector is all that
// is left of a group, its last panel is a vector wide; beyond the group it is zero.
//
// Groups of 4 and 8 channels, ResNeXt's, would leave most of a vector empty. Where whole groups
// fill vectors, a panel is a vector of groups side by side, and c counts within each: a step
// multiplies its weights by the pixel's own vector, in which each group's channel c was shuffled to
// all of the group's lanes. A 3x3 of 32 groups of 4 channels takes a fifth of the time on AVX-512,
// 0.36 on AVX2; one of 8 half on AVX-512. Of 16 it would take 1.2 times as long: one shuffle for
// each step, where a broadcast comes with its load.
#pragma once

#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

#if FR_VECTOR_BYTES == 64
constexpr int kMaxTile = 14;
#else
constexpr int kMaxTile = 6;
#endif
constexpr int kPanelVectors = 2;

// The longest chain of additions in one register. A chain of n rounds n times at the size of its
// sum so far, so its error grows with n; a sum of 4608 terms is 36 chains that are added up after.
// 128 steps are 400 cycles of arithmetic on AVX2 and 1800 on AVX-512; with half as many, putting
// the sums aside costs 4% there and 1 to 2% here. Without FMA a step rounds twice.
constexpr int64_t kChain = FR_VECTOR_BYTES >= 32 ? 128 : 64;
template <class A>
constexpr int kPanel = kPanelVectors * kLanes<A>;

// Channels of each of the groups that lie side by side in a vector; 0: none do. Sums of more than
// one chain are left to the other way.
template <class A>
FR_INLINE int64_t shared_channels(const ConvShape& s) {
  const int64_t g = s.group_c();
  const bool fits = (g == 4 || g == 8) && g < kLanes<A> && s.k % kLanes<A> == 0;
  return s.groups > 1 && g == s.group_k() && fits && s.depth() <= kChain ? g : 0;
}

// Output channels of a group, or of those that share a vector.
template <class A>
FR_INLINE int64_t packed_group(const ConvShape& s) {
  return shared_channels<A>(s) > 0 ? kLanes<A> : s.group_k();
}

// Of one such group.
template <class A>
FR_INLINE int64_t group_panels(const ConvShape& s) {
  return ceil_div(packed_group<A>(s), kPanel<A>);
}

template <class A>
int64_t all_panels(const ConvShape& s) {
  return s.k / packed_group<A>(s) * group_panels<A>(s);
}

// Output channels of the panel that begins at channel k of its group, with the zeros behind them.
template <class A>
FR_INLINE int64_t panel_width(const ConvShape& s, int64_t k) {
  return min_of(ceil_div(packed_group<A>(s) - k, kLanes<A>) * kLanes<A>, kPanel<A>);
}

// Where a panel begins in the packed weight; panels are numbered over all groups.
template <class A>
FR_INLINE int64_t panel_offset(const ConvShape& s, int64_t panel) {
  const int64_t panels = group_panels<A>(s);
  const int64_t group_width = ceil_div(packed_group<A>(s), kLanes<A>) * kLanes<A>;
  return (panel / panels * group_width + panel % panels * kPanel<A>)*s.depth();
}

}  // namespace FR_ISA
}  // namespace fr
