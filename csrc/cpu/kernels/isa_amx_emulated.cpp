// isa_amx.cpp with emulated tiles, for tests on machines that have AVX512-BF16 but not AMX. It is
// never chosen by default, and its peak is measured with AVX512-BF16.
#define FR_EMULATE_TILES
#define FR_ISA amx_emulated
#define FR_VECTOR_BYTES 64
#include "conv_amx.h"

namespace fr {
namespace amx_emulated {

void replace_bfloat16(KernelTable& table) { replace_convolution(table); }

}  // namespace amx_emulated
}  // namespace fr
