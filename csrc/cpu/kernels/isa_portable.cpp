// Compiled with the flags of this instruction set: see setup.py.
#define FR_ISA portable
#define FR_VECTOR_BYTES 16
#include "instantiate.h"

namespace fr {

const KernelTable& kernel_table_portable() {
  static constexpr KernelTable table = portable::make_table("portable");
  return table;
}

}  // namespace fr
