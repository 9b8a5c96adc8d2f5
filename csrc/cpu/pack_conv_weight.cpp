#include "pack_conv_weight.h"

#include "../box.h"
#include "../checks.h"
#include "../parallel.h"
#include "../tensor.h"
#include "conv_driver.h"
#include "folding.h"

namespace fr {

int64_t packed_bytes(const Tensor& weight, const ConvShape& shape) {
  const ScalarType type = weight.scalar_type();
  return kernels().of[dtype_of(type)].packed_numel(shape) *
         static_cast<int64_t>(element_size(packed_type(type)));
}

void pack_weight(const Tensor& weight, const ConvShape& shape, void* packed) {
  const DType dtype = dtype_of(weight.scalar_type());
  const Kernels& k = kernels().of[dtype];
  const bool taps_outside = weight.is_contiguous(kChannelsLast);
  const Tensor source = taps_outside ? weight : weight.contiguous();
  const int64_t panels = k.panels(shape), panel_numel = k.packed_numel(shape) / panels;
  parallel_for(0, panels, std::max<int64_t>(1, 16 * 1024 / panel_numel),
               [&](int64_t begin, int64_t end) {
                 k.pack(shape, !taps_outside, source.const_data_ptr(), begin, end, packed);
               });
}

namespace {

Tensor pack_conv_weight_cpu(const Tensor& weight, int64_t groups) {
  const char* op = "pack_conv_weight";
  check_map(op, "weight", weight);
  const ConvShape s = weight_shape(op, weight.sizes(), groups);
  const ScalarType type = weight.scalar_type();
  const Tensor packed = empty({kernels().of[dtype_of(type)].packed_numel(s)},
                              weight.options().dtype(packed_type(type)));
  pack_weight(weight, s, packed.mutable_data_ptr());
  return packed;
}

Tensor unpack_conv_weight_cpu(const Tensor& packed, IntArrayRef sizes, int64_t groups) {
  const char* op = "unpack_conv_weight";
  const ConvShape s = weight_shape(op, sizes, groups);
  check_storage(op, "packed", packed);
  const ScalarType type = packed.scalar_type();
  FR_CHECK_TYPE(type != ScalarType::Half && packed_type(type) == type, op,
                ": packed: expected a dtype that pack_conv_weight returns here, got ", type);
  const Kernels& k = kernels().of[dtype_of(type)];
  const int64_t numel = k.packed_numel(s);
  FR_CHECK_VALUE(packed.dim() == 1 && packed.size(0) == numel, op, ": packed: expected shape [",
                 numel, "] for weight ", sizes, ", got ", packed.sizes());
  const Tensor weight = empty(sizes, packed.options());
  const Tensor source = packed.contiguous();
  k.unpack(s, source.const_data_ptr(), weight.mutable_data_ptr());
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("pack_conv_weight", FR_BOX(pack_conv_weight_cpu));
  m.impl("unpack_conv_weight", FR_BOX(unpack_conv_weight_cpu));
}

}  // namespace fr
