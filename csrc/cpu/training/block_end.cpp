// The end of a residual block, and its backward.

#include "../../box.h"
#include "../conv_bn_add_relu.h"
#include "../result_cache.h"
#include "blocks.h"
#include "operands.h"
#include "passes.h"

namespace fr {
namespace {

Tensor block_end_cpu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                     const OptionalTensor& shortcut, const OptionalTensor& shortcut_scale,
                     const OptionalTensor& shortcut_shift, Activation activation) {
  const char* op = "block_end";
  const Tensor map = map_operand(op, "z", z);
  const int64_t c = map.size(1);
  const Tensor k = vector_operand(op, "scale", scale, c, map);
  const Tensor b = vector_operand(op, "shift", shift, c, map);
  check_together(op, "shortcut_scale", shortcut_scale, "shortcut_shift", shortcut_shift);
  FR_CHECK_VALUE(shortcut || !shortcut_scale, op,
                 ": shortcut: expected a tensor with shortcut_scale, got None");
  Tensor s, s_scale, s_shift;
  if (shortcut) s = map_operand(op, "shortcut", *shortcut, z.sizes(), z);
  if (shortcut_scale) {
    s_scale = vector_operand(op, "shortcut_scale", *shortcut_scale, c, map);
    s_shift = vector_operand(op, "shortcut_shift", *shortcut_shift, c, map);
  }
  const Tensor y = empty_map(z.sizes(), map.options());
  const BlockEnd args{rows_of(map),          c,
                      map.const_data_ptr(),  k.const_data_ptr(),
                      b.const_data_ptr(),    data_or_null(s),
                      data_or_null(s_scale), data_or_null(s_shift),
                      y.mutable_data_ptr(),  activation};
  const auto kernel = training_kernels_of(map).block_end;
  for_rows(map, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors block_end_backward_cpu(const Tensor& dy, const OptionalTensor& y, const Tensor& z,
                                   const Tensor& mean, const OptionalTensor& shortcut,
                                   const OptionalTensor& shortcut_mean, bool sums,
                                   Activation activation) {
  const char* op = "block_end_backward";
  const Tensor map = map_operand(op, "z", z);
  const int64_t c = map.size(1);
  const Tensor gradient = map_operand(op, "dy", dy, z.sizes(), z);
  const Tensor center = vector_operand(op, "mean", mean, c, map);
  check_together(op, "shortcut", shortcut, "shortcut_mean", shortcut_mean);
  Tensor output, s, s_mean;
  if (y) output = map_operand(op, "y", *y, z.sizes(), z);
  if (shortcut) {
    s = map_operand(op, "shortcut", *shortcut, z.sizes(), z);
    s_mean = vector_operand(op, "shortcut_mean", *shortcut_mean, c, map);
  }

  const Tensor none = empty({0}, map.options());
  const Tensor g = y ? empty_map(z.sizes(), map.options()) : none;
  const auto type = accumulator(map.scalar_type());
  const RowBlocks blocks(rows_of(map), c);
  PartialSums partial(sums ? blocks.count() : 0, kBlockEndRows, c);
  const BlockEndBackward args{rows_of(map),
                              c,
                              gradient.const_data_ptr(),
                              data_or_null(output),
                              activation,
                              map.const_data_ptr(),
                              center.const_data_ptr(),
                              data_or_null(s),
                              data_or_null(s_mean),
                              y ? g.mutable_data_ptr() : nullptr,
                              sums ? partial.data() : nullptr};
  const auto kernel = training_kernels_of(map).block_end_backward;
  if (y || sums) {
    for_row_blocks(map, kBlockEndRows, [&](int64_t begin, int64_t end, int64_t block, void* near) {
      kernel(args, begin, end, block, near);
    });
  }
  if (!sums) {
    // An operator must not return one tensor twice, not even an empty one.
    return {g, empty({0}, type), empty({0}, type), empty({0}, type)};
  }
  return {g, partial.total(kSumG, type), partial.total(kSumGXc, type),
          s.defined() ? partial.total(kSumGShortcutXc, type) : empty({0}, type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("block_end", FR_BOX(block_end_cpu));
  m.impl("block_end_backward", FR_BOX(block_end_backward_cpu));
}

}  // namespace fr
