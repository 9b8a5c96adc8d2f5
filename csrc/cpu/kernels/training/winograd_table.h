// Training convolutions by Winograd's F(4x4, 3x3) as a table's entries: which shapes they fit,
// their blocks, and the operands of each direction. See winograd_conv.h and winograd_wgrad.h.
#pragma once

#include "winograd_conv.h"
#include "winograd_wgrad.h"

namespace fr {
namespace FR_ISA {

// Whether it pays, in multiply-adds as conv_driver.cpp counts them: transforms of the input, of the
// output and of the weight wait for the cache more than they compute. The direct sum comes closer
// to the processor's peak, by a fifth.
inline bool winograd_training_fits(const ConvShape& s) {
  const bool geometry = s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 &&
                        s.pad_h == 1 && s.pad_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
                        s.groups == 1 && s.c % 16 == 0 && s.k % 16 == 0;
  if (!geometry || s.n == 0) return false;
  const double tiles = static_cast<double>(count_tiles(s)), c = static_cast<double>(s.c),
               k = static_cast<double>(s.k), pixels = static_cast<double>(s.n * s.h * s.w);
  const double here = kTilePoints * (tiles * (c * k + 12.5 * c + 10 * k) + 8 * c * k);
  return 1.2 * here < 9 * pixels * c * k;
}

// Of the kept weights of a direction.
inline int64_t winograd_kept_floats(const ConvShape& s) {
  const WinogradPlan plan = WinogradPlan::of(s);
  return plan.kept ? ceil_div(s.k, kPanel<float>) * WinogradLayout::of(s, plan).weight : 0;
}
inline int64_t winograd_packed_bytes(const ConvShape& s) {
  return max_of(winograd_kept_floats(s), winograd_kept_floats(backward_shape(s))) *
         static_cast<int64_t>(sizeof(float));
}

// Panels of the direction that has fewer; both are shared out by it.
inline int64_t winograd_pack_units(const ConvShape& s) {
  return ceil_div(min_of(s.c, s.k), kPanel<float>);
}

template <class T>
void winograd_pack(const ConvShape& s, const WinogradFilter<T>& w, int64_t begin, int64_t end,
                   int64_t units, void* packed) {
  const int64_t panels = ceil_div(s.k, kPanel<float>);
  keep_filters(s, w, panels * begin / units, panels * end / units, static_cast<float*>(packed));
}

template <class T>
void winograd_pack_forward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                           void* packed) {
  winograd_pack(s, WinogradFilter<T>::forward(s, weight), begin, end, winograd_pack_units(s),
                packed);
}

template <class T>
void winograd_pack_backward(const ConvShape& s, const void* weight, int64_t begin, int64_t end,
                            void* packed) {
  winograd_pack(backward_shape(s), WinogradFilter<T>::backward(s, weight), begin, end,
                winograd_pack_units(s), packed);
}

// --- Forward and data gradient. ------------------------------------------------------------------

inline int64_t winograd_blocks(const ConvShape& s) { return WinogradPlan::of(s).blocks(s); }
inline int64_t winograd_splits(const ConvShape& s) { return ceil_div(s.k, kPanel<float>); }

// The layout, followed by an epilogue's sums of all channels.
template <int kRows>
int64_t winograd_scratch_bytes(const ConvShape& s) {
  const WinogradPlan plan = WinogradPlan::of(s);
  return WinogradLayout::of(s, plan).floats(plan) * static_cast<int64_t>(sizeof(float)) +
         BlockSums<float, kRows>::scratch_bytes(s.k);
}

// Bytes of a map of `channels` channels.
template <class T>
FR_INLINE int64_t map_bytes(const ConvShape& s, int64_t channels) {
  return s.n * s.h * s.w * channels * static_cast<int64_t>(sizeof(T));
}

// A group's windows overlap rows that earlier groups have read, so the prefetch starts two rows
// further on.
template <class T>
FR_INLINE int64_t lead_bytes(const ConvShape& s, int64_t channels) {
  return 2 * s.w * channels * static_cast<int64_t>(sizeof(T));
}

template <class T, class Prologue, class Epilogue>
void winograd_direction(const ConvShape& s, const WinogradFilter<T>& w, const void* kept,
                        const TileStreams& streams, int64_t block, int64_t split, int64_t splits,
                        void* scratch, const Prologue& prologue, const Epilogue& epilogue) {
  const WinogradPlan plan = WinogradPlan::of(s);
  const int64_t panels = ceil_div(s.k, kPanel<float>);
  const int64_t panel0 = panels * split / splits, panel1 = panels * (split + 1) / splits;
  float* const own = static_cast<float*>(scratch);
  const int64_t floats = WinogradLayout::of(s, plan).floats(plan);
  const ChannelRange made{panel0 * kPanel<float>, panel_end(s, panel1 - 1)};
  epilogue(own + floats, made, [](const auto& e) { e.begin(); });
  const auto windows = [&](int64_t t0, int64_t t1, const WinogradLayout& l, int64_t depth,
                           float* to) {
    prologue([&](const auto& in) {
      transform_windows<InputTransform>(
          in, s, s.c, 0, s.c, t0, t1, l.tile, l.input_point,
          [&](int64_t c) { return to + c / depth * l.chunk + c % depth; });
    });
  };
  const auto results = [&](int64_t t0, int64_t t1, int64_t k0, int64_t width, int64_t point,
                           bool first, const float* from) {
    epilogue(own + floats, made, [&](const auto& e) {
      transform_results(e, s, k0, width, t0, t1, point, first, from);
      if (k0 + width == made.end) e.fold();
    });
  };
  winograd_block(s, plan, w, static_cast<const float*>(kept), block, panel0, panel1, streams, own,
                 windows, results);
}

template <class T>
void winograd_forward(const TrainingForward& f, int64_t unit, void* scratch) {
  const ConvShape& s = f.shape;
  const int64_t block = unit / f.splits, tiles = count_tiles(s);
  TileStreams streams;
  streams.add(f.x, map_bytes<T>(s, s.c), tiles, lead_bytes<T>(s, s.c));
  streams.add(f.z, map_bytes<T>(s, s.k), tiles, 0);
  winograd_direction(
      s, WinogradFilter<T>::forward(s, f.filter), f.weight, streams, block, unit % f.splits,
      f.splits, scratch, [&](const auto& run) { with_input<T>(f, run); },
      [&](void* near, ChannelRange made, const auto& run) {
        with_result<T>(f, block, near, made, run);
      });
}

template <class T>
void winograd_data_gradient(const TrainingBackward& f, int64_t unit, void* scratch) {
  const ConvShape s = backward_shape(f.shape);
  const int64_t block = unit / f.splits, tiles = count_tiles(s);
  TileStreams streams;
  streams.add(f.g, map_bytes<T>(s, s.c), tiles, lead_bytes<T>(s, s.c));
  streams.add(f.z, map_bytes<T>(s, s.c), tiles, lead_bytes<T>(s, s.c));
  streams.add(f.x_scale ? f.x : f.add, map_bytes<T>(s, s.k), tiles, 0);
  streams.add(f.g_x, map_bytes<T>(s, s.k), tiles, 0);
  winograd_direction(
      s, WinogradFilter<T>::backward(f.shape, f.filter), f.weight, streams, block, unit % f.splits,
      f.splits, scratch, [&](const auto& run) { with_gradient<T>(f, run); },
      [&](void* near, ChannelRange made, const auto& run) {
        with_input_gradient<T>(f, block, near, made, run);
      });
}

inline int64_t winograd_gradient_blocks(const ConvShape& s) {
  return winograd_blocks(backward_shape(s));
}
inline int64_t winograd_gradient_splits(const ConvShape& s) {
  return winograd_splits(backward_shape(s));
}
inline int64_t winograd_gradient_scratch_bytes(const ConvShape& s) {
  return winograd_scratch_bytes<kGradientRows>(backward_shape(s));
}
inline int64_t winograd_pixels(const ConvShape& s, int64_t block) {
  const WinogradPlan plan = WinogradPlan::of(s);
  return count_pixels(s, block * plan.block, plan.end(s, block));
}

// --- Weight gradient. ----------------------------------------------------------------------------

inline int64_t winograd_parts(const ConvShape& s) { return WgradPlan::of(s).parts(s); }
inline int64_t winograd_part_splits(const ConvShape& s) { return ceil_div(s.k, WgradPlan::kRows); }
inline int64_t winograd_part_scratch_bytes(const ConvShape& s) {
  return WgradLayout::of(s, WgradPlan::of(s)).floats() * static_cast<int64_t>(sizeof(float));
}

template <class T>
void winograd_weight_gradient(const TrainingBackward& f, int64_t unit, void* scratch) {
  const ConvShape& s = f.shape;
  const WgradPlan plan = WgradPlan::of(s);
  const int64_t part = unit / f.splits, split = unit % f.splits, tiles = count_tiles(s);
  const int64_t groups = winograd_part_splits(s);
  const int64_t k0 = groups * split / f.splits * WgradPlan::kRows;
  const int64_t k1 = min_of(groups * (split + 1) / f.splits * WgradPlan::kRows, s.k);
  TileStreams streams;
  streams.add(f.x, map_bytes<T>(s, s.c), tiles, lead_bytes<T>(s, s.c));
  streams.add(f.g, map_bytes<T>(s, s.k), tiles, 0);
  streams.add(f.z, map_bytes<T>(s, s.k), tiles, 0);
  const auto x_windows = [&](int64_t t0, int64_t t1, const WgradLayout& l, float* to) {
    with_input<T>(f, [&](const auto& in) {
      for (int64_t c = 0; c < s.c; c += kPanel<float>, to += l.x_panel) {
        const int64_t width = min_of(kPanel<float>, s.c - c);
        transform_windows<InputTransform>(in, s, s.c, c, c + width, t0, t1, width, l.x_point,
                                          [&](int64_t at) { return to + at - c; });
      }
    });
  };
  const auto g_windows = [&](int64_t t0, int64_t t1, int64_t first, int64_t after,
                             const WgradLayout& l, float* to) {
    with_gradient<T>(f, [&](const auto& in) {
      const auto at = [&](int64_t k) {
        return to + (k - first) / kPairRows * l.g_panel + (k - first) % kPairRows;
      };
      transform_windows<GradientTransform>(in, s, s.k, first, after, t0, t1, kPairRows, l.g_point,
                                           at);
    });
  };
  winograd_wgrad_part(s, plan, min_of(part * plan.part, tiles),
                      min_of((part + 1) * plan.part, tiles), k0, k1, streams,
                      static_cast<float*>(scratch),
                      static_cast<float*>(f.dw) + part * s.k * 9 * s.c, x_windows, g_windows);
}

template <class T>
constexpr TrainingConv winograd_training_of() {
  TrainingConv conv{};
  conv.fits = winograd_training_fits;
  conv.packed_bytes = winograd_packed_bytes;
  conv.pack_units = winograd_pack_units;
  conv.pack_forward = winograd_pack_forward<T>;
  conv.pack_backward = winograd_pack_backward<T>;
  conv.forward = {winograd_blocks,
                  winograd_scratch_bytes<kStatisticsRows>,
                  nullptr,
                  winograd_pixels,
                  winograd_forward<T>,
                  winograd_splits};
  conv.data_gradient = {
      winograd_gradient_blocks,  winograd_gradient_scratch_bytes, nullptr, nullptr,
      winograd_data_gradient<T>, winograd_gradient_splits};
  conv.weight_gradient = {winograd_parts, winograd_part_scratch_bytes, winograd_parts,
                          nullptr,        winograd_weight_gradient<T>, winograd_part_splits};
  return conv;
}

}  // namespace FR_ISA
}  // namespace fr
