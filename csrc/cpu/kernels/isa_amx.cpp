// Compiled with the flags of this instruction set: see setup.py. Only the convolution differs
// from AVX512-BF16.
#define FR_ISA amx
#define FR_VECTOR_BYTES 64
#include "conv_amx.h"
#include "peak_amx.h"

namespace fr {
namespace amx {

void replace_bfloat16(KernelTable& table) {
  replace_convolution(table);
  table.peak.dot_bfloat16 = dot_tiles;
}

}  // namespace amx
}  // namespace fr
