// The operators of csrc/schemas.h under a name of their own, for the simulator's CPU tensors.
#include <torch/library.h>

#include "../../csrc/schemas.h"

TORCH_LIBRARY(fused_resnet_simt, m) {
  for (const char* schema : fr::kSchemas) m.def(schema);
}
