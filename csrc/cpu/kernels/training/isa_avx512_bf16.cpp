// Compiled with the flags of this instruction set: see setup.py. Only these kernels differ from
// AVX-512: sums of pairs, and an instruction that rounds what they and Winograd's store.
#define FR_ISA avx512_bf16
#define FR_VECTOR_BYTES 64
#include "direct.h"
#include "winograd_table.h"

namespace fr {
namespace avx512_bf16 {

void replace_bfloat16(TrainingTable& table) {
  table.of[kBFloat16].direct = direct_of<BFloat16, PairTerms>();
  table.of[kBFloat16].winograd = winograd_training_of<BFloat16>();
}

}  // namespace avx512_bf16
}  // namespace fr
