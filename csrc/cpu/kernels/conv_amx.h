// The convolution of conv_bfloat16.h by AMX: same packed weights, same input, different sums.
//
// TDPBF16PS multiplies 16 pixels x 16 pairs by 16 pairs x 16 channels, the work of 256 vdpbf16ps.
//
// Tiling. 32 pixels x 32 channels: 2 x 2 tiles of sums, 2 of pixels, 2 of weights. A row of a tile
// of pixels is 16 pairs of one pixel; a row of a tile of weights one pair of 16 channels, and the
// next row a pair, 128 bytes, further. Per 16 pairs, 4 loads feed 4 multiplications. Up to 16
// pixels are one tile of pixels, more are two of nearly equal height: 28 = 14 + 14.
//
// The remainder of a run after whole steps of 16 pairs is added to the sums by vdpbf16ps, followed
// by the epilogue. Runs of fewer than 16 pairs (a stem, narrow groups) use vdpbf16ps only. A tile
// never extends beyond a run, so a NaN of a neighbouring pixel has no effect. The order of an
// element's sum does not depend on its tile.
#pragma once

#include "conv_bfloat16.h"
#include "tiles.h"

namespace fr {
namespace FR_ISA {

constexpr int64_t kTilePairs = kTileRowBytes / (2 * static_cast<int64_t>(sizeof(BFloat16)));

class MatrixTiles {
 public:
  static constexpr int64_t kPixels = 2 * kTileRows;

  ~MatrixTiles() {
    if (pixels_ > 0) release_tiles();
  }

  void run(int64_t pixels, const PairTile& t) {
    if (pixels != pixels_) configure(pixels);
    fetch_result(t, pixels);
    alignas(64) float sums[kPixels * kChannels];
    if (pixels > kTileRows) {
      multiply<true>(t, sums);
    } else {
      multiply<false>(t, sums);
    }
    finish(pixels, t, sums);
  }

 private:
  // Tiles 0 to 3: sums, two for each tile of pixels. 4 and 5: pixels. 6 and 7: weights.
  void configure(int64_t pixels) {
    pixels_ = pixels;
    const int64_t below = pixels > kTileRows ? pixels / 2 : 0;
    above_ = pixels - below;
    const int64_t rows[kTiles] = {above_, above_, below,      below,
                                  above_, below,  kTilePairs, kTilePairs};
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < kTiles; ++i) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.row_bytes[i] = rows[i] > 0 ? kTileRowBytes : 0;
    }
    configure_tiles(config);
  }

  // Sums the whole steps of all runs into sums[pixel][channel].
  template <bool kBoth>
  FR_INLINE void multiply(const PairTile& t, float* sums) const {
    const int64_t pixel = t.pixel * static_cast<int64_t>(sizeof(BFloat16));
    const int64_t steps = t.runs->length / (2 * kTilePairs);
    const int64_t run_weights = ceil_div(t.runs->length, 2) * 2 * kChannels;
    const int64_t below = above_ * t.pixel;
    const BFloat16* run_start = t.weights;
    const char* ahead = t.ahead;
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (kBoth) {
      zero_tile<2>();
      zero_tile<3>();
    }
    visit_runs(t, [&](const BFloat16* p) {
      const BFloat16* w = run_start;
      for (int64_t i = 0; i < steps; ++i) {
        const char* const end = ahead + kTilePairs * t.ahead_step;
        for (const char* line = ahead; line < end; line += kLineBytes)
          __builtin_prefetch(line, 0, 2);
        ahead = end;
        load_tile<6>(w, kStepBytes);
        load_tile<4>(p, pixel);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(w + kChannels, kStepBytes);
        multiply_tiles<1, 4, 7>();
        if constexpr (kBoth) {
          load_tile<5>(p + below, pixel);
          multiply_tiles<2, 5, 6>();
          multiply_tiles<3, 5, 7>();
        }
        p += 2 * kTilePairs;
        w += 2 * kTilePairs * kChannels;
      }
      run_start += run_weights;
    });
    constexpr int64_t kRow = kChannels * static_cast<int64_t>(sizeof(float));
    store_tile<0>(sums, kRow);
    store_tile<1>(sums + kTileRows, kRow);
    if constexpr (kBoth) {
      store_tile<2>(sums + above_ * kChannels, kRow);
      store_tile<3>(sums + above_ * kChannels + kTileRows, kRow);
    }
  }

  // Adds the remainders, for as many pixels at a time as have sums that fit the registers.
  void finish(int64_t pixels, const PairTile& t, const float* sums) const {
    const int64_t parts = ceil_div(pixels, kPairPixels);
    PairTile part = t;
    part.begun = t.runs->length / (2 * kTilePairs) * kTilePairs;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = pixels * i / parts, end = pixels * (i + 1) / parts;
      part.x = t.x + first * t.pixel;
      part.sums = sums + first * kChannels;
      part.residual = t.residual ? t.residual + first * t.stride : nullptr;
      part.y = t.y + first * t.stride;
      run_pair_tile<true>(end - first, part);
    }
  }

  int64_t pixels_ = 0;  // that the tiles are configured for; 0: not configured
  int64_t above_ = 0;   // of them in the first tile of pixels
};

inline void conv_amx(const ConvForward& f, const ConvBlock& b, void* scratch) {
  if (source_of(f.shape, b).runs.length < 2 * kTilePairs) {
    conv_pairs<VectorTiles>(f, b, scratch);
  } else {
    conv_pairs<MatrixTiles>(f, b, scratch);
  }
}

inline void replace_convolution(KernelTable& table) {
  table.of[kBFloat16].conv = conv_amx;
  table.tile[kBFloat16] = MatrixTiles::kPixels;
  // No Winograd: F(4x4) has a quarter of the multiply-adds, but its float32 products run at a
  // sixteenth of the speed.
  for (WinogradKernels& winograd : table.winograd[kBFloat16]) winograd.run = nullptr;
}

}  // namespace FR_ISA
}  // namespace fr
