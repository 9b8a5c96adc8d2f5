// Compiled with the flags of this instruction set: see setup.py.
#define FR_ISA avx512
#define FR_VECTOR_BYTES 64
#include "instantiate.h"

namespace fr {

const KernelTable& kernel_table_avx512() {
  static constexpr KernelTable table = avx512::make_table("avx512");
  return table;
}

}  // namespace fr
