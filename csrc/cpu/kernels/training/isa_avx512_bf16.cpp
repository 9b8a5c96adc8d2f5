// Compiled with the flags of this instruction set: see setup.py. Only these kernels differ from
// AVX-512.
#define FR_ISA avx512_bf16
#define FR_VECTOR_BYTES 64
#include "direct.h"

namespace fr {
namespace avx512_bf16 {

void replace_bfloat16(TrainingTable& table) {
  table.of[kBFloat16].direct = direct_of<BFloat16, PairTerms>();
}

}  // namespace avx512_bf16
}  // namespace fr
