// Chooses the instruction set whose kernels run in this process.
#pragma once

#include <string>
#include <vector>

#include "../tensor.h"
#include "kernels/table.h"
#include "kernels/training/table.h"

// Which instruction sets setup.py compiled, besides the portable one.
#ifndef FR_HAVE_AVX2
#define FR_HAVE_AVX2 0
#endif
#ifndef FR_HAVE_AVX512
#define FR_HAVE_AVX512 0
#endif
#ifndef FR_HAVE_AVX512_BF16
#define FR_HAVE_AVX512_BF16 0
#endif
#ifndef FR_HAVE_AMX
#define FR_HAVE_AMX 0
#endif
#ifndef FR_HAVE_AMX_EMULATED
#define FR_HAVE_AMX_EMULATED 0
#endif

namespace fr {

// Chosen at the first call: the best that the machine supports, or the one that FUSED_RESNET_ISA
// names. Throws a ValueError if the machine does not support that.
const KernelTable& kernels();

// The training kernels of the same instruction set.
const TrainingTable& training_kernels();

// The names that this machine supports, best first. The last may be amx_emulated, which is for
// tests.
std::vector<std::string> supported_isas();

DType dtype_of(ScalarType type);

// The type of a packed weight for maps of type `storage`: float32 for float16 maps, and for
// bfloat16 maps too unless the instruction set multiplies bfloat16.
ScalarType packed_type(ScalarType storage);

}  // namespace fr
