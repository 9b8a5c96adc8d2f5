// Compiled with the flags of this instruction set: see setup.py. Only these kernels
// differ from AVX-512.
#define FR_ISA avx512_bf16
#define FR_VECTOR_BYTES 64
#include "conv_bfloat16.h"
#include "max_pool_bfloat16.h"
#include "peak.h"
#include "winograd.h"

namespace fr {
namespace avx512_bf16 {

void replace_bfloat16(KernelTable& table) {
  Kernels& bfloat16 = table.of[kBFloat16];
  bfloat16.panels = all_pair_panels;
  bfloat16.conv_scratch_bytes = conv_bfloat16_scratch_bytes;
  bfloat16.conv = conv_pairs<VectorTiles>;
  bfloat16.max_pool_after_relu = max_pool_bfloat16;
  bfloat16.pack = pack_bfloat16;
  bfloat16.unpack = unpack_bfloat16;
  bfloat16.packed_numel = packed_bfloat16_numel;
  bfloat16.packed = kBFloat16;
  table.winograd[kBFloat16][0] = winograd_of<4, BFloat16, BFloat16>();
  // In float, tiles of 2x2 save less than the instruction does.
  table.winograd[kBFloat16][1].run = nullptr;
  table.peak.dot_bfloat16 = dot_bfloat16;
}

}  // namespace avx512_bf16
}  // namespace fr
