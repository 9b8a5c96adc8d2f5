// Which instruction set's kernels run in this process.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <vector>

#include "kernels/table.h"
#include "kernels/training/table.h"

namespace fr {

// Chosen once, at the first call: the best that the machine has, or what FUSED_RESNET_ISA names.
// Throws a ValueError where that names none that the machine supports.
const KernelTable& kernels();

// The training kernels of the same instruction set.
const TrainingTable& training_kernels();

// Names that this machine supports, best first; the last may be amx_emulated, which is for tests.
std::vector<std::string> supported_isas();

DType dtype_of(at::ScalarType type);

// Of a weight packed for maps of this type: bfloat16 where the instruction set multiplies that,
// else float32 for it and for float16.
at::ScalarType packed_type(at::ScalarType storage);

}  // namespace fr
