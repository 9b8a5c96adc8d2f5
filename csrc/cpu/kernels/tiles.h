// AMX's instructions, one function each. No other file uses them.
//
// AMX has 8 tiles, registers of up to 16 rows of up to 64 bytes, whose sizes are set at run time.
// GCC 12's intrinsics do not declare the memory that an instruction reads, so a preceding store may
// be moved after it; and their tile numbers must be literals, where these are template arguments.
//
// With FR_EMULATE_TILES the functions are plain C++, for tests on machines without AMX.
#pragma once

#include "vec.h"

namespace fr {
namespace FR_ISA {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The memory layout that LDTILECFG reads. An unused tile has zero rows and zero bytes.
struct alignas(64) TileConfig {
  uint8_t palette;  // 1: the only one
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace FR_ISA
}  // namespace fr

#ifdef FR_EMULATE_TILES
#include "tiles_emulated.h"
#else

namespace fr {
namespace FR_ISA {

// Also clears all tiles.
FR_INLINE void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Without it every context switch would save 8 KiB more.
FR_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
FR_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// The stride is in bytes, from one row to the next.
template <int kTile>
FR_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
FR_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

// C += A x B: a row of A has pairs of bfloat16, a row of B one pair for each float in a row of C.
template <int kC, int kA, int kB>
FR_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace FR_ISA
}  // namespace fr

#endif
