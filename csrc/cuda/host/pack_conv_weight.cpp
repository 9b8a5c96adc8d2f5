// On CUDA a packed weight is the weight in its own dtype, flat in channels_last order, which the
// implicit matrix products read.
#include <ATen/ATen.h>

#include "conv_call.h"

namespace fr {
namespace {

at::Tensor pack_conv_weight_cuda(const at::Tensor& weight, int64_t groups) {
  const char* op = "pack_conv_weight";
  check_map(op, "weight", weight);
  weight_shape(op, weight.sizes(), groups);
  return weight.permute({0, 2, 3, 1}).clone(at::MemoryFormat::Contiguous).view({-1});
}

at::Tensor unpack_conv_weight_cuda(const at::Tensor& packed, at::IntArrayRef shape,
                                   int64_t groups) {
  const char* op = "unpack_conv_weight";
  check_storage(op, "packed", packed);
  weight_shape(op, shape, groups);
  TORCH_CHECK_VALUE(
      packed.dim() == 1 && packed.numel() == shape[0] * shape[1] * shape[2] * shape[3], op,
      ": packed: expected the elements of a weight ", shape, ", got ", packed.sizes());
  return packed.view({shape[0], shape[2], shape[3], shape[1]})
      .permute({0, 3, 1, 2})
      .clone(at::MemoryFormat::Contiguous);
}

}  // namespace

FR_CUDA_LIBRARY(m) {
  m.impl("pack_conv_weight", &pack_conv_weight_cuda);
  m.impl("unpack_conv_weight", &unpack_conv_weight_cuda);
}

}  // namespace fr
