// Compiled with the flags of this instruction set and nothing but it: see setup.py.
#define FR_ISA avx512
#define FR_VECTOR_BYTES 64
#include "instantiate.h"

namespace fr {

const TrainingTable& training_table_avx512() {
  static constexpr TrainingTable table = avx512::make_training_table();
  return table;
}

}  // namespace fr
