// Compiled with the flags of this instruction set and nothing but it: see setup.py.
#define FR_ISA avx2
#define FR_VECTOR_BYTES 32
#include "instantiate.h"

namespace fr {

const TrainingTable& training_table_avx2() {
  static constexpr TrainingTable table = avx2::make_training_table();
  return table;
}

}  // namespace fr
