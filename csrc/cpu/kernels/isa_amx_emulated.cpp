// isa_amx.cpp for tests on machines with AVX512-BF16 alone: tiles are emulated, the rest is the
// same. Nothing takes it by itself. Its peak stays that of AVX512-BF16: no core does more here.
#define FR_EMULATE_TILES
#define FR_ISA amx_emulated
#define FR_VECTOR_BYTES 64
#include "conv_amx.h"

namespace fr {
namespace amx_emulated {

void replace_bfloat16(KernelTable& table) { replace_convolution(table); }

}  // namespace amx_emulated
}  // namespace fr
