// Which algorithm each direction of a training convolution takes. Decided by the shape, the dtype
// and the instruction set, never by the number of threads, on which no bit may depend.
#pragma once

#include "../isa.h"

namespace fr {

// Null: a convolution between passes.
const TrainingConv* plan_forward(DType dtype, const ConvShape& shape, bool winograd);

// Whether that convolution is inference's direct sum; else it is PyTorch's.
bool is_direct_forward(DType dtype, const ConvShape& shape);

struct BackwardPlan {
  const TrainingConv *data, *weight;  // null where not needed, or PyTorch's
  bool one_pass;                      // by `data`'s both_gradients
};
BackwardPlan plan_backward(DType dtype, const ConvShape& shape, bool need_input, bool need_weight,
                           bool winograd);

}  // namespace fr
