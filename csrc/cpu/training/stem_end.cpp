// The end of the stem, batch norm, ReLU and max-pool, and its backward.

#include "../../box.h"
#include "../conv_bn_add_relu.h"
#include "../result_cache.h"
#include "operands.h"
#include "passes.h"

namespace fr {
namespace {

PoolForward pool_of(const char* op, const Tensor& z, IntArrayRef kernel, IntArrayRef stride,
                    IntArrayRef padding) {
  check_pair(op, "kernel", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  FR_CHECK_VALUE(kernel[0] <= 255 && kernel[1] <= 255 && kernel[0] * kernel[1] <= 255, op,
                 ": kernel: expected at most 255 places, got ", kernel);
  FR_CHECK_VALUE(stride[0] < int64_t{1} << 31 && stride[1] < int64_t{1} << 31, op,
                 ": stride: expected ints below 2^31, got ", stride);
  FR_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1], op,
                 ": padding: expected at most half of kernel ", kernel, ", got ", padding);
  FR_CHECK_VALUE(z.size(2) + 2 * padding[0] >= kernel[0] && z.size(3) + 2 * padding[1] >= kernel[1],
                 op, ": kernel: expected at most the padded map of ", z.size(2), " x ", z.size(3),
                 ", got ", kernel);
  PoolForward p{};
  p.h = z.size(2);
  p.w = z.size(3);
  p.c = z.size(1);
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  return p;
}

std::tuple<Tensor, Tensor> stem_end_cpu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                        IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                        Activation activation) {
  const char* op = "stem_end";
  const Tensor map = map_operand(op, "z", z);
  const PoolForward pool = pool_of(op, map, kernel, stride, padding);
  const Tensor k = vector_operand(op, "scale", scale, pool.c, map);
  const Tensor b = vector_operand(op, "shift", shift, pool.c, map);
  const std::array<int64_t, 4> sizes{map.size(0), pool.c, pool.out_h(), pool.out_w()};
  const Tensor y = empty_map(sizes, map.options());
  const Tensor index = empty_map(sizes, map.options().dtype(ScalarType::Byte));
  const StemEnd args{pool,
                     activation,
                     map.const_data_ptr(),
                     k.const_data_ptr(),
                     b.const_data_ptr(),
                     y.mutable_data_ptr(),
                     index.mutable_data_ptr<uint8_t>()};
  const auto kernel_of = training_kernels_of(map).stem_end;
  if (y.numel() > 0) {
    parallel_for(0, sizes[0] * sizes[2], 1,
                 [&](int64_t begin, int64_t end) { kernel_of(args, begin, end); });
  }
  return {y, index};
}

std::tuple<Tensor, Tensor, Tensor> stem_end_backward_cpu(const Tensor& dy, const Tensor& index,
                                                         const Tensor& z, const Tensor& scale,
                                                         const Tensor& shift, const Tensor& mean,
                                                         IntArrayRef kernel, IntArrayRef stride,
                                                         IntArrayRef padding, bool sums,
                                                         Activation activation) {
  const char* op = "stem_end_backward";
  const Tensor map = map_operand(op, "z", z);
  const PoolForward pool = pool_of(op, map, kernel, stride, padding);
  const std::array<int64_t, 4> sizes{map.size(0), pool.c, pool.out_h(), pool.out_w()};
  const Tensor gradient = map_operand(op, "dy", dy, sizes, map);
  FR_CHECK_VALUE(index.sizes().equals(sizes), op, ": index: expected shape ", IntArrayRef(sizes),
                 ", got ", index.sizes());
  FR_CHECK_TYPE(index.scalar_type() == ScalarType::Byte, op, ": index: expected dtype uint8, got ",
                index.scalar_type());
  check_device(op, "index", index, map);
  check_storage(op, "index", index);
  const Tensor places = index.contiguous(kChannelsLast);
  const Tensor k = vector_operand(op, "scale", scale, pool.c, map);
  const Tensor b = vector_operand(op, "shift", shift, pool.c, map);
  const Tensor center = vector_operand(op, "mean", mean, pool.c, map);

  const Tensor g = empty_map(map.sizes(), map.options());
  const int64_t rows = map.size(0) * pool.h;
  // Rows of a block, by the map alone: about kSumRows pixels.
  const int64_t each = std::max<int64_t>(kSumRows / std::max<int64_t>(pool.w, 1), 1);
  const int64_t blocks = g.numel() > 0 ? (rows + each - 1) / each : 0;
  PartialSums partial(sums ? blocks : 0, kGradientRows, pool.c);
  const StemEndBackward args{pool,
                             rows * pool.w,
                             activation,
                             gradient.const_data_ptr(),
                             places.const_data_ptr<uint8_t>(),
                             map.const_data_ptr(),
                             k.const_data_ptr(),
                             b.const_data_ptr(),
                             center.const_data_ptr(),
                             g.mutable_data_ptr(),
                             sums ? partial.data() : nullptr};
  const auto kernel_of = training_kernels_of(map).stem_end_backward;
  for_blocks(blocks, 1, kGradientRows * pool.c * arithmetic_bytes(map),
             [&](int64_t block, void* scratch) {
               kernel_of(args, block * each, std::min((block + 1) * each, rows), block, scratch);
             });
  const auto type = accumulator(map.scalar_type());
  if (!sums) return {g, empty({0}, type), empty({0}, type)};
  return {g, partial.total(kSumG, type), partial.total(kSumGXc, type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("stem_end", FR_BOX(stem_end_cpu));
  m.impl("stem_end_backward", FR_BOX(stem_end_backward_cpu));
}

}  // namespace fr
