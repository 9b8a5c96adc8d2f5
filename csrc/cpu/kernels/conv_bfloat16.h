// Convolution, batch norm, residual and ReLU over channels-last bfloat16 maps, by AVX512-BF16.
//
//   y[n, oy, ox, k] = relu(scale[k] * sum_{r, s, c} x[n, oy*S - P + r*D, ox*S - P + s*D, c]
//                                                   * w[k, c, r, s] + shift[k] + residual)
//
// As conv_bn_add_relu.h, but vdpbf16ps adds the products of two neighbours in the depth to each of
// 16 float sums: twice the multiply-adds of a float instruction, from half the bytes. The epilogue
// is in float and rounds once. Flops: 2 * pixels * K * depth. Bytes: x, w, y and the residual once
// each where a block of x fits the L2 cache.
//
// The instruction takes subnormal numbers for zero, and rounds to nearest whatever the mode is.
// Products of bfloat16 numbers are exact in float, so a result depends only on the order of the
// sum, which is the same for any number of threads, and on the last rounding.
//
// Tiling. 14 pixels x 32 channels: 28 vectors of sums, 2 of weights, 1 to broadcast a pair of a
// pixel's elements. Per step along the depth, 14 broadcasts and 2 loads feed 28 multiply-adds.
//
// Weights are packed [group][panel of 32 channels][run][pair][channel][2], zero where a panel
// is wider than the group. A run is a sequence of input elements adjacent in memory: with one group
// a row of the kernel, kw * C elements; else the channels of one tap. A run of odd length ends in
// half a pair: there the weight is zero, and the element after the run, which may be NaN, is not
// read.
//
// Input. Without padding, pixels are read in place; with padding, the rows under a block are copied
// first. Some are copied column by column, the taps of a kernel's row side by side for each output
// column: strided 1x1 kernels, which do not use half of the pixels in a row; pixels whose distance
// is a multiple of 4 KiB, 14 of which would share a set of the 12-way L1 cache; dilated rows of an
// odd number of channels, whose pairs straddle two taps; and maps narrower than a tile, whose rows
// then follow each other without a gap, so that 7x7 pixels are 4 tiles and not 7.
#pragma once

#include <immintrin.h>

#include "table.h"
#include "transpose.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

constexpr int kPairPixels = 14;
constexpr int kChannels = 32;
constexpr int64_t kStepBytes = kChannels * 2 * static_cast<int64_t>(sizeof(BFloat16));

// Pixels this far apart map to the same sets of the L1 cache; an extra cache line separates them.
constexpr int64_t kAliasBytes = 4096;
constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(BFloat16));

// Runs of elements side by side in the sum of one output element.
struct PairRuns {
  int64_t count;
  int64_t per_row;  // of the kernel
  int64_t length;
  int64_t row_step, col_step;  // distances from one to the next, in elements
};

inline int64_t pairs_of(const PairRuns& runs) { return runs.count * ceil_div(runs.length, 2); }

// The runs of the packed weight: rows of the kernel, or taps if there are groups.
inline PairRuns weight_runs(const ConvShape& s) {
  PairRuns runs{};
  runs.per_row = s.groups == 1 ? 1 : s.kw;
  runs.count = s.kh * runs.per_row;
  runs.length = s.groups == 1 ? s.kw * s.c : s.group_c();
  return runs;
}

// The layout of a block of input; distances are in elements.
struct PairSource {
  bool gathered;              // copied to scratch, `rows` x `cols` pixels of each image
  int64_t taps;               // input pixels side by side in a gathered one
  int64_t step_h, step_w;     // input pixels from one gathered pixel to the next
  int64_t rows, cols, pitch;  // pitch: of gathered pixels
  int64_t image, row, pixel;  // from the input of one output to the next one's
  PairRuns runs;
};

inline PairSource source_of(const ConvShape& s, const ConvBlock& b) {
  const int64_t width = b.col1 - b.col0;
  const bool adjacent = s.groups == 1 && s.dilation_w == 1;
  const bool aliased = s.stride_w * s.c * static_cast<int64_t>(sizeof(BFloat16)) % kAliasBytes == 0;
  const bool straddling = s.groups == 1 && s.dilation_w > 1 && s.kw > 1 && s.c % 2 != 0;
  const bool narrow = s.kw > 1 && s.stride_h == 1 && b.row1 - b.row0 > 1 && width == s.out_w() &&
                      width < kPairPixels;
  const bool by_column = narrow || aliased || straddling || (s.kw == 1 && s.stride_w > 1);
  // The taps of a dilated row are separate runs even where a copy has them adjacent: the order of a
  // sum must not depend on the block.
  PairSource p{};
  p.gathered = by_column || s.pad_h > 0 || s.pad_w > 0;
  p.taps = by_column ? s.kw : 1;
  p.step_h = p.gathered && s.kh == 1 ? s.stride_h : 1;
  p.step_w = by_column ? s.stride_w : 1;
  p.rows = (b.row1 - b.row0 - 1) * s.stride_h / p.step_h + (s.kh - 1) * s.dilation_h + 1;
  p.cols = by_column ? width : (width - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
  p.pitch = p.taps * s.c;
  if (by_column && p.pitch * static_cast<int64_t>(sizeof(BFloat16)) % kAliasBytes == 0)
    p.pitch += kLine;
  const int64_t row = p.gathered ? p.cols * p.pitch : s.w * s.c;
  p.image = p.gathered ? p.rows * row : s.h * row;
  p.row = s.stride_h / p.step_h * row;
  p.pixel = by_column ? p.pitch : s.stride_w * s.c;
  p.runs = weight_runs(s);
  if (!adjacent && !straddling) {  // with one group an even number of channels: as it is packed
    p.runs.per_row = s.kw;
    p.runs.count = s.kh * s.kw;
    p.runs.length = s.group_c();
  }
  p.runs.row_step = s.dilation_h * row;
  p.runs.col_step = by_column ? s.c : s.dilation_w * s.c;
  return p;
}

inline int64_t conv_bfloat16_scratch_bytes(const ConvShape& s, const ConvBlock& b) {
  const PairSource p = source_of(s, b);
  return p.gathered ? (b.n1 - b.n0) * p.image * static_cast<int64_t>(sizeof(BFloat16)) : 0;
}

// Copies columns [col, col + count) of an input row; null stands for a row of padding.
inline void gather_columns(const ConvShape& s, const BFloat16* row, int64_t col, int64_t count,
                           BFloat16* to) {
  const int64_t left = row ? min_of(max_of(-col, 0), count) : count;
  const int64_t right = row ? max_of(min_of(s.w - col, count), left) : count;
  const size_t pixel = static_cast<size_t>(s.c) * sizeof(BFloat16);
  __builtin_memset(to, 0, static_cast<size_t>(left) * pixel);
  if (right > left) {
    __builtin_memcpy(to + left * s.c, row + (col + left) * s.c,
                     static_cast<size_t>(right - left) * pixel);
  }
  __builtin_memset(to + right * s.c, 0, static_cast<size_t>(count - right) * pixel);
}

inline void gather_pairs(const ConvShape& s, const ConvBlock& b, const PairSource& p,
                         const BFloat16* x, BFloat16* to) {
  const int64_t y0 = b.row0 * s.stride_h - s.pad_h, x0 = b.col0 * s.stride_w - s.pad_w;
  for (int64_t n = b.n0; n < b.n1; ++n) {
    for (int64_t i = 0; i < p.rows; ++i, to += p.cols * p.pitch) {
      const int64_t y = y0 + i * p.step_h;
      const BFloat16* row = y < 0 || y >= s.h ? nullptr : x + (n * s.h + y) * s.w * s.c;
      if (p.taps == 1 && p.step_w == 1 && p.pitch == s.c) {
        gather_columns(s, row, x0, p.cols, to);
        continue;
      }
      for (int64_t j = 0; j < p.cols; ++j) {
        BFloat16* pixel = to + j * p.pitch;
        const int64_t col = x0 + j * p.step_w;
        if (s.dilation_w == 1) {
          gather_columns(s, row, col, p.taps, pixel);
          continue;
        }
        for (int64_t t = 0; t < p.taps; ++t)
          gather_columns(s, row, col + t * s.dilation_w, 1, pixel + t * s.c);
      }
    }
  }
}

// A pair of neighbouring elements in every lane, or one element and a zero.
FR_INLINE __m512bh broadcast_pair(const BFloat16* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}
FR_INLINE __m512bh broadcast_half(const BFloat16* p) {
  return (__m512bh)_mm512_maskz_set1_epi16(0x55555555u, static_cast<short>(p->bits));
}

// The operands of the microkernel.
struct PairTile {
  const BFloat16* x;  // the first pixel's first element
  int64_t pixel;
  const PairRuns* runs;
  const BFloat16* weights;
  const char* ahead;  // weights of the next panel to prefetch, ahead_step bytes per step
  int64_t ahead_step;
  const float* sums;   // partial sums, kChannels per pixel, for kBegun
  int64_t begun;       // pairs of each run that are in the partial sums
  const float* scale;  // at the panel's first channel
  const float* shift;
  const BFloat16* residual;  // at the tile's first element; null: none
  BFloat16* y;               // likewise
  int64_t stride;            // elements from one output pixel to the next
  __mmask32 channels;        // of the panel that exist
  bool relu;
};

// Calls visit(the first pixel's elements) for each run.
template <class Visit>
FR_INLINE void visit_runs(const PairTile& t, Visit visit) {
  int64_t tap = 0;
  const BFloat16* row = t.x;
  for (int64_t run = 0; run < t.runs->count; ++run, ++tap) {
    if (tap == t.runs->per_row) {
      tap = 0;
      row += t.runs->row_step;
    }
    visit(row + tap * t.runs->col_step);
  }
}

// From pair `first` of each run.
template <int kTile>
FR_INLINE void multiply_pairs(const PairTile& t, int64_t first, __m512 (&acc)[kTile][2]) {
  const BFloat16* w = t.weights;
  const char* ahead = t.ahead;
  const int64_t pixel = t.pixel, steps = t.runs->length / 2;
  const bool half = t.runs->length % 2 != 0;
  visit_runs(t, [&](const BFloat16* p) {
    p += 2 * first;
    w += 2 * first * kChannels;
    const auto step = [&](auto broadcast) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + kChannels);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const __m512bh pair = broadcast(p + i * pixel);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], w0, pair);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], w1, pair);
      }
      p += 2;
      w += 2 * kChannels;
    };
    for (int64_t i = first; i < steps; ++i, ahead += t.ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      step(broadcast_pair);
    }
    if (half) step(broadcast_half);
  });
}

template <int kTile>
FR_INLINE void store_pairs(const PairTile& t, const __m512 (&acc)[kTile][2]) {
  const __mmask16 low = static_cast<__mmask16>(t.channels);
  const __mmask16 high = static_cast<__mmask16>(t.channels >> 16);
  const __m512 scale[2] = {_mm512_maskz_loadu_ps(low, t.scale),
                           _mm512_maskz_loadu_ps(high, t.scale + 16)};
  const __m512 shift[2] = {_mm512_maskz_loadu_ps(low, t.shift),
                           _mm512_maskz_loadu_ps(high, t.shift + 16)};
  const bool whole = t.channels == 0xffffffffu;
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    __m512 v[2] = {_mm512_fmadd_ps(acc[i][0], scale[0], shift[0]),
                   _mm512_fmadd_ps(acc[i][1], scale[1], shift[1])};
    if (t.residual) {
      const BFloat16* from = t.residual + i * t.stride;
      const __m512i r =
          whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(t.channels, from);
      const __m512i r0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(r));
      const __m512i r1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(r, 1));
      v[0] = _mm512_add_ps(v[0], _mm512_castsi512_ps(_mm512_slli_epi32(r0, 16)));
      v[1] = _mm512_add_ps(v[1], _mm512_castsi512_ps(_mm512_slli_epi32(r1, 16)));
    }
    if (t.relu) {  // in this order a NaN passes
      v[0] = _mm512_max_ps(_mm512_setzero_ps(), v[0]);
      v[1] = _mm512_max_ps(_mm512_setzero_ps(), v[1]);
    }
    __m512i y = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
    // Only -0 and NaN can have a sign here; clear it, as max_pool_bfloat16.h requires.
    if (t.relu) y = _mm512_and_si512(y, _mm512_set1_epi16(0x7fff));
    BFloat16* to = t.y + i * t.stride;
    if (whole) {
      _mm512_storeu_si512(to, y);
    } else {
      _mm512_mask_storeu_epi16(to, t.channels, y);
    }
  }
}

// Prefetches the residual and the result, which then arrive while the sum is computed.
FR_INLINE void fetch_result(const PairTile& t, int64_t pixels) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < pixels; ++i) {
    if (t.residual) __builtin_prefetch(t.residual + i * t.stride, 0, 3);
    __builtin_prefetch(t.y + i * t.stride, 1, 3);
  }
}

template <int kTile, bool kBegun>
void pair_tile(const PairTile& t) {
  __m512 acc[kTile][2] = {};
  if constexpr (kBegun) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      acc[i][0] = _mm512_loadu_ps(t.sums + i * kChannels);
      acc[i][1] = _mm512_loadu_ps(t.sums + i * kChannels + 16);
    }
    multiply_pairs<kTile>(t, t.begun, acc);
  } else {
    fetch_result(t, kTile);
    multiply_pairs<kTile>(t, 0, acc);
  }
  store_pairs<kTile>(t, acc);
}

template <bool kBegun>
void run_pair_tile(int64_t pixels, const PairTile& t) {
  static constexpr void (*tiles[])(const PairTile&) = {
      pair_tile<1, kBegun>,  pair_tile<2, kBegun>,  pair_tile<3, kBegun>,  pair_tile<4, kBegun>,
      pair_tile<5, kBegun>,  pair_tile<6, kBegun>,  pair_tile<7, kBegun>,  pair_tile<8, kBegun>,
      pair_tile<9, kBegun>,  pair_tile<10, kBegun>, pair_tile<11, kBegun>, pair_tile<12, kBegun>,
      pair_tile<13, kBegun>, pair_tile<14, kBegun>,
  };
  tiles[pixels - 1](t);
}

// Computes the pixels of a tile with vectors; MatrixTiles in conv_amx.h uses AMX.
struct VectorTiles {
  static constexpr int64_t kPixels = kPairPixels;
  void run(int64_t pixels, const PairTile& t) const { run_pair_tile<false>(pixels, t); }
};

template <class Tiles>
void conv_pairs(const ConvForward& f, const ConvBlock& b, void* scratch) {
  const ConvShape& s = f.shape;
  const PairSource source = source_of(s, b);
  const BFloat16* base;
  if (source.gathered) {
    gather_pairs(s, b, source, static_cast<const BFloat16*>(f.x), static_cast<BFloat16*>(scratch));
    base = static_cast<const BFloat16*>(scratch);
  } else {
    base = static_cast<const BFloat16*>(f.x) + b.n0 * source.image + b.row0 * source.row +
           b.col0 * source.pixel;
  }

  // Rows that are contiguous in the input and in the result are one row.
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  int64_t images = b.n1 - b.n0, rows = b.row1 - b.row0, width = b.col1 - b.col0;
  if (width == out_w && source.row == width * source.pixel) {
    width *= rows;
    if (rows == out_h && source.image == width * source.pixel) {
      width *= images;
      images = 1;
    }
    rows = 1;
  }

  // Tiles of nearly equal width: 16 pixels are 8 + 8 rather than 14 + 2.
  const int64_t tiles = ceil_div(width, Tiles::kPixels);
  const int64_t narrow = width / tiles, wider = width % tiles;
  const int64_t panels = ceil_div(s.group_k(), kChannels);
  const int64_t pairs = pairs_of(source.runs), panel_bytes = pairs * kStepBytes;
  Tiles by_tile;
  PairTile t{};
  t.pixel = source.pixel;
  t.runs = &source.runs;
  t.stride = s.k;
  t.relu = f.activation == Activation::kReLU;
  t.ahead_step = ceil_div(kStepBytes, images * rows * tiles);
  for (int64_t panel = b.panel0; panel < b.panel1; ++panel) {
    const int64_t group = panel / panels;
    const int64_t k_in_group = panel % panels * kChannels;
    const int64_t k = group * s.group_k() + k_in_group;
    const int64_t channels = min_of(s.group_k() - k_in_group, kChannels);
    const char* packed = static_cast<const char*>(f.packed);
    t.weights = reinterpret_cast<const BFloat16*>(packed + panel * panel_bytes);
    t.scale = static_cast<const float*>(f.scale) + k;
    t.shift = static_cast<const float*>(f.shift) + k;
    t.channels = static_cast<__mmask32>(0xffffffffu >> (kChannels - channels));
    // While this panel is used, prefetch the next one, or the first one for the next block.
    t.ahead = packed + (panel + 1 < b.panel1 ? panel + 1 : b.panel0) * panel_bytes;
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < rows; ++i) {
        const BFloat16* row = base + n * source.image + i * source.row + group * s.group_c();
        const int64_t out = ((b.n0 + n) * out_h + b.row0 + i) * out_w + b.col0;
        for (int64_t j = 0, first = 0, end; j < tiles; ++j, first = end) {
          end = first + narrow + (j < wider);
          const int64_t at = (out + first) * s.k + k;
          t.x = row + first * source.pixel;
          t.residual = f.residual ? static_cast<const BFloat16*>(f.residual) + at : nullptr;
          t.y = static_cast<BFloat16*>(f.y) + at - f.y_first * s.k;
          by_tile.run(end - first, t);
          t.ahead += t.ahead_step * pairs;
        }
      }
    }
  }
}

inline int64_t all_pair_panels(const ConvShape& s) {
  return s.groups * ceil_div(s.group_k(), kChannels);
}

inline int64_t packed_bfloat16_numel(const ConvShape& s) {
  return all_pair_panels(s) * pairs_of(weight_runs(s)) * 2 * kChannels;
}

// Calls visit(place in packed, place in the weight) for each element of a panel's filters. The
// weight is (K, C, kh, kw) in memory where `taps_inside`; else (K, kh, kw, C).
template <class Visit>
FR_INLINE void visit_pairs(const ConvShape& s, bool taps_inside, int64_t panel, Visit visit) {
  const PairRuns runs = weight_runs(s);
  const int64_t panels = ceil_div(s.group_k(), kChannels), depth = s.depth();
  const int64_t k0 = panel % panels * kChannels;
  const int64_t channels = min_of(s.group_k() - k0, kChannels);
  const int64_t first = (panel / panels * s.group_k() + k0) * depth;
  const int64_t taps = s.kh * s.kw, run_pairs = ceil_div(runs.length, 2);
  const int64_t to = panel * pairs_of(runs) * 2 * kChannels;
  // A cache line of a filter at a time, for all filters: column by column instead, the filters'
  // lines would share a few sets of the cache and evict each other.
  for (int64_t i = 0; i < depth; i += kLine) {
    const int64_t count = min_of(depth - i, kLine);
    int64_t places[kLine];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = taps_inside ? (i + j) % taps * s.group_c() + (i + j) / taps : i + j;
      const int64_t in_run = at % runs.length;
      places[j] = (at / runs.length * run_pairs + in_run / 2) * 2 * kChannels + in_run % 2;
    }
    for (int64_t k = 0; k < channels; ++k) {
      for (int64_t j = 0; j < count; ++j) visit(to + places[j] + 2 * k, first + k * depth + i + j);
    }
  }
}

// Pairs that lie in the weight as they are packed: words, of which squares of filters by depth are
// transposed in registers.
inline void pack_words(const uint32_t* w, int64_t channels, int64_t words, uint32_t* p) {
  constexpr int lanes = kLanes<float>;
  const int64_t whole_words = words / lanes * lanes, whole_channels = channels / lanes * lanes;
  for (int64_t i = 0; i < whole_words; i += lanes) {
    for (int64_t k = 0; k < whole_channels; k += lanes) {
      transpose_square<float>(reinterpret_cast<const float*>(w + k * words + i), words,
                              [=](int64_t j, Vec<float> line) {
                                __builtin_memcpy(p + (i + j) * kChannels + k, &line, sizeof line);
                              });
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t i = k < whole_channels ? whole_words : 0; i < words; ++i)
      p[i * kChannels + k] = w[k * words + i];
  }
}

inline void pack_bfloat16(const ConvShape& s, bool taps_inside, const void* weight, int64_t panel0,
                          int64_t panel1, void* packed) {
  const BFloat16* w = static_cast<const BFloat16*>(weight);
  BFloat16* p = static_cast<BFloat16*>(packed);
  const PairRuns runs = weight_runs(s);
  const int64_t numel = pairs_of(runs) * 2 * kChannels;
  const bool in_order = (!taps_inside || s.kh * s.kw == 1) && runs.length % 2 == 0;
  const int64_t panels = ceil_div(s.group_k(), kChannels);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const int64_t k0 = panel % panels * kChannels;
    const int64_t channels = min_of(s.group_k() - k0, kChannels);
    if (!in_order || channels < kChannels)
      __builtin_memset(p + panel * numel, 0, static_cast<size_t>(numel) * sizeof(BFloat16));
    if (in_order) {
      const BFloat16* first = w + (panel / panels * s.group_k() + k0) * s.depth();
      pack_words(reinterpret_cast<const uint32_t*>(first), channels, s.depth() / 2,
                 reinterpret_cast<uint32_t*>(p + panel * numel));
    } else {
      visit_pairs(s, taps_inside, panel, [=](int64_t to, int64_t from) { p[to] = w[from]; });
    }
  }
}

inline void unpack_bfloat16(const ConvShape& s, const void* packed, void* weight) {
  const BFloat16* p = static_cast<const BFloat16*>(packed);
  BFloat16* w = static_cast<BFloat16*>(weight);
  for (int64_t panel = 0; panel < all_pair_panels(s); ++panel)
    visit_pairs(s, true, panel, [=](int64_t from, int64_t to) { w[to] = p[from]; });
}

}  // namespace FR_ISA
}  // namespace fr
