// How a convolution's weight is cut: panels of output channels, for the microkernels of
// conv_bn_add_relu.h and winograd.h.
//
// Weights are packed [group][panel of output channels][r][s][c][panel]. Where a vector is all that
// is left of a group, its last panel is a vector wide; beyond the group it is zero.
//
// Groups of 4 and 8 channels (ResNeXt) would leave most of a vector empty. Where whole groups fill
// vectors, a panel is one vector of adjacent groups. Its steps multiply the pixel's vector with its
// even channels in the place of the odd ones, and then the reverse, both of which are part of a
// load. Lanes 2p and 2p + 1 of a group then hold channel 2p (or 2p + 1), which `share / 2` sums
// need for as many pairs of result channels: sum t adds to pair p + t in the place of pair p, and
// is turned by t pairs at the end.
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
// The most pixels of a tile. Double's is narrower, as eight sums keep two FMA units busy: its
// convolutions check others more often than they are run for themselves, and each number of pixels
// is a function to compile.
template <class A>
constexpr int kMostPixels = sizeof(A) == sizeof(float) ? kMaxTile : 4;

// The longest chain of additions in one register. A chain of n rounds n times at the size of its
// sum so far, so its error grows with n; a sum of 4608 terms is 36 chains that are added up after.
// 128 steps are 400 cycles of arithmetic on AVX2 and 1800 on AVX-512; with 64, moving the sums to
// memory costs 4% on AVX2 and 1 to 2% on AVX-512. Without FMA a step rounds twice.
constexpr int64_t kChain = FR_VECTOR_BYTES >= 32 ? 128 : 64;
template <class A>
constexpr int kPanel = kPanelVectors * kLanes<A>;

// Channels per group if several groups share a vector, else 0. Sums longer than one chain do not
// share vectors.
template <class A>
FR_INLINE int64_t shared_channels(const ConvShape& s) {
  const int64_t g = s.group_c();
  const bool fits = (g == 4 || g == 8) && g < kLanes<A> && s.k % kLanes<A> == 0;
  return s.groups > 1 && g == s.group_k() && fits && s.depth() <= kChain ? g : 0;
}

// Where such a panel has the weight of channel c of a group for the panel's result channel k,
// counted from the first of its tap.
template <class A>
FR_INLINE int64_t shared_at(int64_t share, int64_t c, int64_t k) {
  const int64_t turns = share / 2, pair = c / 2, group = k / share;
  const int64_t turn = (k % share / 2 - pair + turns) % turns;
  return (c % 2 * turns + turn) * kLanes<A> + group * share + 2 * pair + k % 2;
}

// Output channels of a group, or of all groups that share a vector.
template <class A>
FR_INLINE int64_t packed_group(const ConvShape& s) {
  return shared_channels<A>(s) > 0 ? kLanes<A> : s.group_k();
}

// Panels of one such group.
template <class A>
FR_INLINE int64_t group_panels(const ConvShape& s) {
  return ceil_div(packed_group<A>(s), kPanel<A>);
}

template <class A>
int64_t all_panels(const ConvShape& s) {
  return s.k / packed_group<A>(s) * group_panels<A>(s);
}

// Width of the panel that begins at channel k of its group, zero padding included.
template <class A>
FR_INLINE int64_t panel_width(const ConvShape& s, int64_t k) {
  return min_of(ceil_div(packed_group<A>(s) - k, kLanes<A>) * kLanes<A>, kPanel<A>);
}

// Offset of a panel in the packed weight; panels are numbered over all groups.
template <class A>
FR_INLINE int64_t panel_offset(const ConvShape& s, int64_t panel) {
  const int64_t panels = group_panels<A>(s);
  const int64_t group_width = ceil_div(packed_group<A>(s), kLanes<A>) * kLanes<A>;
  return (panel / panels * group_width + panel % panels * kPanel<A>)*s.depth();
}

}  // namespace FR_ISA
}  // namespace fr
