// The operators of csrc/schemas.h under a name of their own, for the simulator's CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/errors.h"
#include "../../csrc/python/python_hooks.h"
#include "../../csrc/schemas.h"
#include "../../csrc/tf32.h"

STABLE_TORCH_LIBRARY(fused_resnet_simt, m) {
  for (const char* schema : fr::kSchemas) m.def(schema);
}

namespace fr {

bool conv_allows_tf32() { return python_conv_allows_tf32(); }

const bool type_errors = (set_throw_type_error(&throw_python_type_error), true);

}  // namespace fr
