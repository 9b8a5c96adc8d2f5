// Compiled with the flags of this instruction set and nothing but it: see setup.py.
#define FR_ISA portable
#define FR_VECTOR_BYTES 16
#include "instantiate.h"

namespace fr {

const TrainingTable& training_table_portable() {
  static constexpr TrainingTable table = portable::make_training_table();
  return table;
}

}  // namespace fr
