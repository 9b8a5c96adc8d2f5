#include "conv_call.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../tensor.h"

namespace fr {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int>::max();

}  // namespace

// Kernels index the pixels of a batch, the elements of one image, the rows and columns of the
// padded image and the terms of a sum with 32 bits, and an image in the batch with 64. A row or
// column below -2^30 stands for one that is outside of the image at every tap.
void check_conv_sizes(const char* op, const ConvShape& s) {
  FR_CHECK_VALUE(s.h * s.w * s.c <= kIntMax, op,
                 ": x: expected less than 2^31 elements in an image, got ", s.h * s.w * s.c);
  FR_CHECK_VALUE(std::max(s.h + 2 * s.pad_h, s.w + 2 * s.pad_w) < kIntMax / 2, op,
                 ": padding: expected a padded map of less than 2^30 rows and columns, got ",
                 s.h + 2 * s.pad_h, " x ", s.w + 2 * s.pad_w);
  FR_CHECK_VALUE(s.depth() <= kIntMax, op,
                 ": weight: expected less than 2^31 elements in a filter, got ", s.depth());
  FR_CHECK_VALUE(s.n * s.out_h() * s.out_w() <= kIntMax, op,
                 ": x: expected a result of less than 2^31 pixels, got ",
                 s.n * s.out_h() * s.out_w());
}

ConvPrecision conv_precision(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return ConvPrecision::kFloat16;
    case ScalarType::BFloat16:
      return ConvPrecision::kBFloat16;
    case ScalarType::Float:
      return conv_allows_tf32() ? ConvPrecision::kTf32 : ConvPrecision::kFloat32;
    default:
      FR_CHECK_TYPE(false, op, ": x: expected dtype float32, bfloat16 or float16 on ", x.device(),
                    ", got ", x.scalar_type());
  }
}

ConvCall::ConvCall(const char* op, const Tensor& x, IntArrayRef weight_shape, const ConvGeometry& g)
    : ConvCall(op, x, conv_shape(op, x, weight_shape, g.stride, g.padding, g.dilation, g.groups)) {}

ConvCall::ConvCall(const char* op, const Tensor& x, const ConvShape& shape)
    : op_(op),
      x_(x),
      scope_(x),
      shape_(shape),
      precision_(conv_precision(op, x)),
      params_(conv_params(shape_)) {
  check_conv_sizes(op, shape_);
  params_.image.x = map(x);
}

const void* ConvCall::map(const Tensor& t) {
  const Tensor dense = t.dim() == 4 ? t.contiguous(kChannelsLast) : t.contiguous();
  const void* data = operands_.keep(dense).const_data_ptr();
  aligned_ = aligned_ && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return data;
}

const float* ConvCall::vector(const char* name, const OptionalTensor& v, int64_t channels) {
  check_vector(op_, name, v, channels, x_);
  return operands_.floats(v);
}

void ConvCall::set_weight(const Tensor& weight) {
  check_same(op_, "weight", weight, weight.sizes(), x_);
  params_.weight = map(weight);
}

void ConvCall::set_packed(const Tensor& packed) {
  check_same(op_, "packed", packed, {shape_.k * params_.depth}, x_);
  params_.weight = map(packed);
}

void ConvCall::set_second(const Tensor& x, IntArrayRef stride) {
  check_map(op_, "x2", x);
  FR_CHECK_VALUE(shape_.groups == 1, op_, ": groups: expected 1, got ", shape_.groups);
  const ConvShape second =
      conv_shape(op_, x, {shape_.k, x.size(1), 1, 1}, stride, {0, 0}, {1, 1}, 1);
  FR_CHECK_VALUE(
      second.n == shape_.n && second.out_h() == shape_.out_h() && second.out_w() == shape_.out_w(),
      op_, ": x2: expected ", shape_.n, " images with a pixel for each of ", shape_.out_h(), " x ",
      shape_.out_w(), " results, got ", x.sizes(), " with stride ", stride);
  check_same(op_, "x2", x, x.sizes(), x_);
  check_conv_sizes(op_, second);
  params_.second = conv_params(second).image;
  params_.second.x = map(x);
  FR_CHECK_VALUE(shape_.depth() + second.c <= kIntMax, op_,
                 ": x2: expected less than 2^31 terms in a sum, got ", shape_.depth() + second.c);
  params_.depth += params_.second.c;
}

void ConvCall::set_batch_norm(const OptionalTensor& conv_bias, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                              double eps) {
  ConvAffine& a = params_.epilogue.affine;
  a.conv_bias = vector("conv_bias", conv_bias, shape_.k);
  a.weight = vector("bn_weight", weight, shape_.k);
  a.bias = vector("bn_bias", bias, shape_.k);
  a.mean = vector("mean", mean, shape_.k);
  a.var = vector("var", var, shape_.k);
  a.eps = static_cast<float>(eps);
}

void ConvCall::set_affine(const OptionalTensor& scale, const OptionalTensor& shift) {
  params_.epilogue.affine.weight = vector("scale", scale, shape_.k);
  params_.epilogue.affine.bias = vector("shift", shift, shape_.k);
}

void ConvCall::set_residual(const OptionalTensor& residual, const OptionalTensor& scale,
                            const OptionalTensor& shift) {
  if (!residual) return;
  check_same(op_, "residual", residual, {shape_.n, shape_.k, shape_.out_h(), shape_.out_w()}, x_);
  FR_CHECK_VALUE(scale.has_value() == shift.has_value(), op_,
                 ": residual_scale, residual_shift: expected both or neither");
  params_.epilogue.residual = map(*residual);
  params_.epilogue.residual_scale = vector("residual_scale", scale, shape_.k);
  params_.epilogue.residual_shift = vector("residual_shift", shift, shape_.k);
}

void ConvCall::set_plan(int64_t tile, int64_t split_k) {
  FR_CHECK_VALUE(tile >= -1 && tile < kConvTiles, op_, ": tile: expected -1 to ", kConvTiles - 1,
                 ", got ", tile);
  FR_CHECK_VALUE(split_k == -1 || (split_k >= 1 && split_k <= 64), op_,
                 ": split_k: expected -1 or 1 to 64, got ", split_k);
  tile_ = tile;
  split_k_ = split_k;
}

ConvPlan ConvCall::plan(bool may_split) const {
  ConvPlan plan = plan_conv(params_, precision_, aligned_, may_split && split_k_ != 1,
                            scope_.multiprocessors());
  if (tile_ >= 0) plan.tile = static_cast<int>(tile_);
  if (split_k_ >= 1 && may_split) plan.split_k = static_cast<int>(split_k_);
  plan.tile = std::max(plan.tile, first_conv_tile(params_, precision_, aligned_));
  return plan;
}

void ConvCall::launch(const ConvPlan& plan) {
  const int64_t partial = conv_partial_numel(params_, plan);
  if (partial > 0) {
    const Options options = x_.options().dtype(ScalarType::Float);
    params_.partial = operands_.keep(device_empty({partial}, options)).mutable_data_ptr<float>();
  }
  check_launch(op_, conv_bn_add_relu(params_, precision_, plan, aligned_, scope_.stream()));
}

Tensor ConvCall::empty_map(int64_t channels) {
  return device_empty({shape_.n, channels, shape_.out_h(), shape_.out_w()}, x_.options(),
                      kChannelsLast);
}

Tensor ConvCall::run() {
  const Tensor y = empty_map(shape_.k);
  params_.epilogue.y = y.mutable_data_ptr();
  launch(plan(true));
  return y;
}

std::vector<Tensor> ConvCall::run_with_statistics() {
  const ConvPlan chosen = plan(false);
  const Options options = x_.options().dtype(ScalarType::Float);
  const Tensor slabs = device_empty({conv_statistics_numel(params_, chosen)}, options);
  const Tensor mean = device_empty({shape_.k}, options), var = device_empty({shape_.k}, options);
  const Tensor y = empty_map(shape_.k);
  params_.epilogue.y = y.mutable_data_ptr();
  params_.statistics = slabs.mutable_data_ptr<float>();
  launch(chosen);
  check_launch(op_, conv_statistics(params_, chosen, mean.mutable_data_ptr<float>(),
                                    var.mutable_data_ptr<float>(), scope_.stream()));
  return {y, mean, var};
}

Tensor ConvCall::run_then_1x1(const Tensor& packed, const Tensor& scale, const Tensor& shift,
                              const Tensor& residual) {
  const int64_t k = scale.numel();
  ResidualBlockCall block{params_, nullptr, {}};
  block.second.k = static_cast<int>(k);
  if (!residual_block_fits(block, precision_, aligned_)) return {};
  check_same(op_, "packed", packed, {k * shape_.k}, x_);
  check_same(op_, "residual", residual, {shape_.n, k, shape_.out_h(), shape_.out_w()}, x_);
  block.weight2 = map(packed);
  block.second.affine.weight = vector("scale", scale, k);
  block.second.affine.bias = vector("shift", shift, k);
  block.second.residual = map(residual);
  block.second.activation = params_.epilogue.activation;
  // This kernel requires operands that begin at multiples of 16 bytes.
  if (!aligned_) return {};
  const Tensor y = empty_map(k);
  block.second.y = y.mutable_data_ptr();
  check_launch(op_, residual_block(block, precision_, scope_.stream()));
  return y;
}

}  // namespace fr
