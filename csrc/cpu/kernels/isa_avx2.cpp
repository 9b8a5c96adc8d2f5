// Compiled with the flags of this instruction set: see setup.py.
#define FR_ISA avx2
#define FR_VECTOR_BYTES 32
#include "instantiate.h"

namespace fr {

const KernelTable& kernel_table_avx2() {
  static constexpr KernelTable table = avx2::make_table("avx2");
  return table;
}

}  // namespace fr
