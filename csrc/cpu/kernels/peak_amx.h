// The peak benchmark of peak.h for bfloat16, by AMX.
#pragma once

#include "tiles.h"

namespace fr {
namespace FR_ISA {

// Four chains of products of whole tiles, on registers alone.
inline double dot_tiles(int64_t iterations) {
  uint16_t ones[kTileRows * kTileRowBytes / 2];
  for (uint16_t& one : ones) one = 0x3f80;
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < kTiles; ++i) {
    config.rows[i] = kTileRows;
    config.row_bytes[i] = kTileRowBytes;
  }
  configure_tiles(config);
  load_tile<4>(ones, kTileRowBytes);
  load_tile<5>(ones, kTileRowBytes);
  load_tile<6>(ones, kTileRowBytes);
  load_tile<7>(ones, kTileRowBytes);
  for (int64_t n = 0; n < iterations; ++n) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  release_tiles();
  return 4.0 * 2.0 * 16 * 16 * 32 * static_cast<double>(iterations);
}

}  // namespace FR_ISA
}  // namespace fr
