#include "operands.h"

#include "../conv_bn_add_relu.h"

namespace fr {
namespace {

// Of a size, and of a stride, padding or dilation: below it nothing that is computed from them
// overflows.
constexpr int64_t kMostSize = int64_t{1} << 31;

void check_sizes(const char* op, const char* name, IntArrayRef sizes) {
  for (const int64_t size : sizes) {
    FR_CHECK_VALUE(size < kMostSize, op, ": ", name, ": expected sizes below 2^31, got ", sizes);
  }
}

}  // namespace

Tensor map_operand(const char* op, const char* name, const Tensor& t) {
  check_map(op, name, t);
  check_sizes(op, name, t.sizes());
  FR_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, ": expected device cpu, got ", t.device());
  return t.contiguous(kChannelsLast);
}

Tensor map_operand(const char* op, const char* name, const Tensor& t, IntArrayRef shape,
                   const Tensor& like) {
  check_same(op, name, t, shape, like);
  return t.contiguous(kChannelsLast);
}

Tensor vector_operand(const char* op, const char* name, const Tensor& t, int64_t channels,
                      const Tensor& map) {
  check_vector(op, name, t, channels, map);
  const ScalarType type = accumulator(map.scalar_type());
  FR_CHECK_TYPE(t.scalar_type() == type, op, ": ", name, ": expected dtype ", type, " for maps of ",
                map.scalar_type(), ", got ", t.scalar_type());
  return t.contiguous();
}

void check_together(const char* op, const char* first, const OptionalTensor& a, const char* second,
                    const OptionalTensor& b) {
  FR_CHECK_VALUE(a.has_value() == b.has_value(), op, ": ", first, ", ", second,
                 ": expected both or neither, got ", a ? first : second, " alone");
}

ConvShape training_shape(const char* op, const Tensor& x, const Tensor& weight, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_sizes(op, "stride", stride);
  check_sizes(op, "padding", padding);
  check_sizes(op, "dilation", dilation);
  check_sizes(op, "weight", weight.sizes());
  const ConvShape s = conv_shape(op, x, weight.sizes(), stride, padding, dilation, groups);
  check_storage(op, "weight", weight);
  const ScalarType type = weight.scalar_type(), maps = x.scalar_type();
  FR_CHECK_TYPE(type == maps || type == accumulator(maps), op, ": weight: expected dtype ", maps,
                ", got ", type);
  check_device(op, "weight", weight, x);
  const double pixels = static_cast<double>(s.out_h()) * static_cast<double>(s.out_w());
  FR_CHECK_VALUE(pixels * static_cast<double>(s.n) * static_cast<double>(s.k) < 0x1p47, op,
                 ": padding: expected a result of less than 2^47 elements, got ", s.n, " x ", s.k,
                 " x ", s.out_h(), " x ", s.out_w());
  return s;
}

}  // namespace fr
