// tiles.h in plain C++, after the definitions in Intel's manual: the contents of tiles, the
// rounding and the faults. Included by tiles.h.
#pragma once

#include <cfloat>

namespace fr {
namespace FR_ISA {

struct EmulatedTile {
  int rows, row_bytes;
  uint32_t words[kTileRows][kTileRowBytes / 4];  // zero beyond its rows and bytes
};

struct EmulatedTiles {
  bool configured;
  EmulatedTile tile[kTiles];
};

inline thread_local EmulatedTiles emulated_tiles;

// Ends the process where the instruction would fault.
FR_INLINE void fault_unless(bool valid) {
  if (!valid) __builtin_trap();
}

inline void configure_tiles(const TileConfig& config) {
  fault_unless(config.palette == 1 && config.start_row == 0);
  for (const uint8_t reserved : config.reserved) fault_unless(reserved == 0);
  emulated_tiles = {};
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], row_bytes = config.row_bytes[i];
    fault_unless(rows <= kTileRows && row_bytes <= kTileRowBytes);
    fault_unless((rows == 0) == (row_bytes == 0));
    fault_unless(i < kTiles || rows == 0);
    if (i < kTiles) emulated_tiles.tile[i] = {rows, row_bytes, {}};
  }
  emulated_tiles.configured = true;
}

inline void release_tiles() { emulated_tiles = {}; }

template <int kTile>
EmulatedTile& emulated_tile() {
  static_assert(kTile >= 0 && kTile < kTiles, "no such tile");
  fault_unless(emulated_tiles.configured && emulated_tiles.tile[kTile].rows > 0);
  return emulated_tiles.tile[kTile];
}

template <int kTile>
void zero_tile() {
  EmulatedTile& tile = emulated_tile<kTile>();
  __builtin_memset(tile.words, 0, sizeof tile.words);
}

template <int kTile>
void load_tile(const void* from, int64_t stride) {
  EmulatedTile& tile = emulated_tile<kTile>();
  zero_tile<kTile>();
  for (int m = 0; m < tile.rows; ++m) {
    const char* row = static_cast<const char*>(from) + m * stride;
    __builtin_memcpy(tile.words[m], row, static_cast<size_t>(tile.row_bytes));
  }
}

template <int kTile>
void store_tile(void* to, int64_t stride) {
  const EmulatedTile& tile = emulated_tile<kTile>();
  for (int m = 0; m < tile.rows; ++m) {
    char* row = static_cast<char*>(to) + m * stride;
    __builtin_memcpy(row, tile.words[m], static_cast<size_t>(tile.row_bytes));
  }
}

// Flushes subnormal numbers to zero, as the instruction does with its inputs and outputs.
FR_INLINE float flushed(float v) {
  return __builtin_fabsf(v) < FLT_MIN ? __builtin_copysignf(0.0f, v) : v;
}
FR_INLINE float first_of(uint32_t pair) { return flushed(bits_to_float(pair << 16)); }
FR_INLINE float second_of(uint32_t pair) { return flushed(bits_to_float(pair & 0xffff0000u)); }

template <int kC, int kA, int kB>
void multiply_tiles() {
  static_assert(kC != kA && kC != kB && kA != kB, "three tiles");
  EmulatedTile& c = emulated_tile<kC>();
  const EmulatedTile &a = emulated_tile<kA>(), &b = emulated_tile<kB>();
  fault_unless(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
  fault_unless(c.row_bytes % 4 == 0);

  // Over all of a tile's words, so that the loops are vectors; those beyond it stay zero below.
  constexpr int kWords = kTileRowBytes / 4;
  float first[kTileRows][kWords], second[kTileRows][kWords];
  for (int k = 0; k < b.rows; ++k) {
    for (int n = 0; n < kWords; ++n) {
      first[k][n] = first_of(b.words[k][n]);
      second[k][n] = second_of(b.words[k][n]);
    }
  }
  for (int m = 0; m < c.rows; ++m) {
    // The sums of first and of second products are apart until the row's end.
    float sum[kWords] = {}, other[kWords] = {};
    for (int k = 0; k < b.rows; ++k) {
      const float x = first_of(a.words[m][k]), y = second_of(a.words[m][k]);
      for (int n = 0; n < kWords; ++n) {
        sum[n] = flushed(__builtin_fmaf(x, first[k][n], sum[n]));
        other[n] = flushed(__builtin_fmaf(y, second[k][n], other[n]));
      }
    }
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      const float before = flushed(bits_to_float(c.words[m][n]));
      c.words[m][n] = float_to_bits(flushed(before + flushed(sum[n] + other[n])));
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
