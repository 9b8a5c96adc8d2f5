// On CUDA a packed weight is the weight in its own dtype, flat in channels_last order, which the
// implicit matrix products read.

#include "../../tensor.h"
#include "conv_call.h"

namespace fr {
namespace {

Tensor pack_conv_weight_cuda(const Tensor& weight, int64_t groups) {
  const char* op = "pack_conv_weight";
  check_map(op, "weight", weight);
  weight_shape(op, weight.sizes(), groups);
  return view(permute(weight, {0, 2, 3, 1}).clone(kContiguous), {-1});
}

Tensor unpack_conv_weight_cuda(const Tensor& packed, IntArrayRef shape, int64_t groups) {
  const char* op = "unpack_conv_weight";
  check_storage(op, "packed", packed);
  weight_shape(op, shape, groups);
  FR_CHECK_VALUE(packed.dim() == 1 && packed.numel() == shape[0] * shape[1] * shape[2] * shape[3],
                 op, ": packed: expected the elements of a weight ", shape, ", got ",
                 packed.sizes());
  const Tensor flat = view(packed, {shape[0], shape[2], shape[3], shape[1]});
  return permute(flat, {0, 3, 1, 2}).clone(kContiguous);
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("pack_conv_weight", FR_BOX(pack_conv_weight_cuda));
  m.impl("unpack_conv_weight", FR_BOX(unpack_conv_weight_cuda));
}

}  // namespace fr
