// Convolution, batch norm, residual and ReLU over channels-last maps, in inference.
//
//   y[n, oy, ox, k] = relu(scale[k] * sum_{r, s, c} x[n, oy*S - P + r*D, ox*S - P + s*D, c]
//                                                   * w[k, c, r, s] + shift[k] + residual)
//
// A matrix product without the matrix: a microkernel multiplies the input pixels under `tile`
// output pixels by a panel of weights, for `panel` output channels, with the whole sum in
// registers, and applies the epilogue there, so the output is written once and never read. Flops: 2
// * pixels * K * depth. Bytes: x, w, y and the residual once each where a block of x fits the L2
// cache.
//
// Weights are packed in panels, see panels.h: the microkernel reads one front to back, and
// meanwhile fetches a share of the panel that comes next, and of the next block (next_block.h).
//
// Input. Where no padding is needed and no conversion either, pixels are read in place, unless they
// lie a multiple of a page apart: a tile's would share one set of the L1 cache and evict each
// other. Then, and where a 1x1 convolution converts, the pixels that are used are copied side by
// side; else the rows under a block of output rows are copied, padded and widened. The copy is
// scratch that stays in the L2 cache. In place and in rows the taps of one kernel row that touch
// each other (dilation 1, one group) are one run of kw * C elements, so a 7x7 kernel over 3
// channels has 7 runs of 21 and wastes nothing.
#pragma once

#include "conv_input.h"
#include "conv_tile.h"
#include "next_block.h"
#include "panels.h"
#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

template <class T>
void conv(const ConvForward& f, const ConvBlock& b, void* scratch) {
  using A = Acc<T>;
  const ConvShape& s = f.shape;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t panels = group_panels<A>(s), group_k = packed_group<A>(s);
  const int64_t share = shared_channels<A>(s);

  Source source;
  const A* base;
  A* copy = reinterpret_cast<A*>(static_cast<char*>(scratch) + list_bytes(b));
  source.pixel = s.stride_w * s.c;
  const Reading reading = reading_of<T>(s);
  if (reading == kInPlace) {
    source.image = s.h * s.w * s.c;
    source.row = s.stride_h * s.w * s.c;
    source.runs = runs_of(s, s.w * s.c);
    base = static_cast<const A*>(f.x) + b.n0 * source.image + b.row0 * source.row +
           b.col0 * s.stride_w * s.c;
  } else if (reading == kPixels) {
    gather_pixels(s, b, static_cast<const T*>(f.x), copy);
    source.pixel = pixel_step<A>(s);
    source.row = (b.col1 - b.col0) * source.pixel;
    source.image = (b.row1 - b.row0) * source.row;
    source.runs = {1, 1, s.group_c(), 0, 0};
    base = copy;
  } else {
    const int64_t cols = block_cols(s, b);
    gather_block(s, b, static_cast<const T*>(f.x), copy);
    source.image = block_rows(s, b) * cols * s.c;
    source.row = s.stride_h * cols * s.c;
    source.runs = runs_of(s, cols * s.c);
    base = copy;
  }

  int64_t images = b.n1 - b.n0, rows = b.row1 - b.row0, width = b.col1 - b.col0;
  if (kIndirect) {
    list_pixels(b, source, static_cast<int64_t*>(scratch));
    // Rows that follow each other in the result without a gap are one row.
    if (width == out_w) {
      width *= rows;
      if (rows == out_h) {
        width *= images;
        images = 1;
      }
      rows = 1;
    }
  }
  // Tiles of nearly equal width: 16 pixels are 8 + 8 rather than 14 + 2.
  const int64_t tiles = ceil_div(width, most_pixels<A>(share));
  const int64_t narrow = width / tiles, wider = width % tiles;
  const int64_t all_tiles = images * rows * tiles;
  Pixels<A> pixels;
  pixels.step = source.pixel;
  Epilogue<T> e;
  e.stride = s.k;
  e.activation = f.activation;
  NextBlock next = NextBlock::of<T>(f, b, panels * (s.k / group_k));
  const int64_t next_step = next.step((b.panel1 - b.panel0) * all_tiles * s.depth());
  for (int64_t panel = b.panel0; panel < b.panel1; ++panel) {
    const int64_t group = panel / panels;
    const int64_t k_in_group = panel % panels * kPanel<A>;
    const int64_t k = group * group_k + k_in_group;
    const int64_t first_c = share > 0 ? k : group * s.group_c();
    const int64_t panel_size = panel_width<A>(s, k_in_group);
    Weights<A> weights;
    weights.at = static_cast<const A*>(f.packed) + panel_offset<A>(s, panel);
    // Every tile prefetches its share of the next panel, or of this one if it is the last.
    weights.ahead = weights.at + (panel + 1 < b.panel1 ? panel_size * s.depth() : 0);
    weights.ahead_step = ceil_div(panel_size, all_tiles);
    weights.next_step = next_step;
    e.scale = static_cast<const A*>(f.scale) + k;
    e.shift = static_cast<const A*>(f.shift) + k;
    e.cols = min_of(group_k - k_in_group, kPanel<A>);
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t oy = 0; oy < rows; ++oy) {
        const int64_t out = ((b.n0 + n) * out_h + b.row0 + oy) * out_w + b.col0;
        for (int64_t t = 0, ox0 = 0, ox1; t < tiles; ++t, ox0 = ox1) {
          ox1 = ox0 + narrow + (t < wider);
          const int64_t at = (out + ox0) * s.k + k;
          e.residual = f.residual ? static_cast<const T*>(f.residual) + at : nullptr;
          e.y = static_cast<T*>(f.y) + at - f.y_first * s.k;
          pixels.base = base + first_c;
          if (kIndirect) {
            pixels.offset = static_cast<const int64_t*>(scratch) + (n * rows + oy) * width + ox0;
          } else {
            pixels.base += n * source.image + oy * source.row + ox0 * source.pixel;
          }
          weights.next = next.take(next_step * s.depth());
          run_tile(share, panel_size, ox1 - ox0, pixels, source.runs, weights, e);
          weights.ahead += weights.ahead_step * s.depth();
        }
      }
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
