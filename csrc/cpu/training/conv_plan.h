// Which algorithm each direction of a training convolution takes. Decided by the shape, the dtype
// and the instruction set, never by the number of threads, on which no bit may depend.
#pragma once

#include "../isa.h"

namespace fr {

// Null: PyTorch's convolution, between passes.
const TrainingConv* plan_forward(DType dtype, const ConvShape& shape, bool winograd);

struct BackwardPlan {
  const TrainingConv *data, *weight;  // null where not needed, or PyTorch's
  bool one_pass;                      // by `data`'s both_gradients
};
BackwardPlan plan_backward(DType dtype, const ConvShape& shape, bool need_input, bool need_weight,
                           bool winograd);

}  // namespace fr
