#include "program_check.h"

#include <algorithm>
#include <array>
#include <string>

#include "../checks.h"
#include "../tensor.h"
#include "conv_bn_add_relu.h"

namespace fr {
namespace {

constexpr const char* kNames[kNumOperations] = {
    "conv",   "conv_max_pool", "max_pool", "zero_pad_shortcut", "global_avg_pool",
    "linear", "avg_pool",      "add_relu"};

using Pair = std::array<int64_t, 2>;

// Checks the steps one after the other and adds them to a program.
class Checker {
 public:
  Checker(const char* op, const Tensor& like, TensorList tensors, CheckedProgram& program)
      : op_of_all_(op), like_(like), tensors_(tensors), program_(program) {}

  // The integers of the step begin at `fields`.
  void add(const int64_t* fields) {
    fields_ = fields;
    begin();
    Step step{};
    step.operation = static_cast<Operation>(at(kOperation));
    step.input = at(kInput);
    step.residual = takes_residual() ? at(kResidual) : -1;
    step.activation = static_cast<Activation>(at(kActivation));
    program_.values.push_back(result(step));
    program_.steps.push_back(step);
  }

 private:
  const char* const op_of_all_;
  const Tensor& like_;
  const TensorList tensors_;
  CheckedProgram& program_;
  const int64_t* fields_ = nullptr;
  std::string label_;  // of this step, in messages
  const char* op_ = nullptr;

  int64_t at(Field field) const { return fields_[field]; }
  Pair pair(Field field) const { return {fields_[field], fields_[field + 1]}; }

  bool takes_residual() const { return at(kOperation) == kConv || at(kOperation) == kAddRelu; }

  // Checks the fields that all operations have.
  void begin() {
    const int64_t number = static_cast<int64_t>(program_.steps.size());
    label_ = std::string(kRunProgram) + ": step " + std::to_string(number);
    op_ = op_of_all_ ? op_of_all_ : label_.c_str();
    FR_CHECK_VALUE(at(kOperation) >= 0 && at(kOperation) < kNumOperations, op_,
                   ": operation: expected an int from 0 to ", kNumOperations - 1, ", got ",
                   at(kOperation));
    if (!op_of_all_) {
      label_ += std::string(" (") + kNames[at(kOperation)] + ")";
      op_ = label_.c_str();
    }
    const auto check_value = [&](const char* name, int64_t value) {
      FR_CHECK_VALUE(value >= 0 && value <= number, op_, ": ", name,
                     ": expected a value from 0 to ", number, ", got ", value);
    };
    check_value("input", at(kInput));
    if (takes_residual() && (at(kResidual) != -1 || at(kOperation) == kAddRelu))
      check_value("residual", at(kResidual));
    FR_CHECK_VALUE(at(kActivation) >= 0 && at(kActivation) < kNumActivations, op_,
                   ": activation: expected an int from 0 to ", kNumActivations - 1, ", got ",
                   at(kActivation));
    FR_CHECK_VALUE(at(kCeilMode) == 0 || at(kCeilMode) == 1, op_,
                   ": ceil_mode: expected 0 or 1, got ", at(kCeilMode));
  }

  // The sizes of the step's result; completes the step.
  MapSizes result(Step& step) {
    const MapSizes x = program_.values[static_cast<size_t>(step.input)];
    if (step.operation != kLinear && step.operation != kAddRelu) {
      FR_CHECK_VALUE(!x.flat, op_, ": x: expected 4 dimensions (N, C, H, W), got ",
                     IntArrayRef(x.shape()));
    }
    switch (step.operation) {
      case kConv:
        return conv(step, x);
      case kConvMaxPool: {
        const MapSizes y = conv(step, x);
        return pool(step, y, kPoolKernelH, kPoolStrideH, kPoolPadH, false);
      }
      case kMaxPool:
      case kAvgPool:
        return pool(step, x, kKernelH, kStrideH, kPadH, at(kCeilMode) == 1);
      case kZeroPadShortcut:
        return zero_pad(step, x);
      case kGlobalAvgPool:
        FR_CHECK_VALUE(x.h > 0 && x.w > 0, op_, ": x: expected a map with pixels, got ",
                       IntArrayRef(x.shape()));
        return {x.n, x.c, 1, 1, false};
      case kLinear:
        return linear(step, x);
      default:
        check_residual(step, x);
        return x;
    }
  }

  MapSizes conv(Step& step, const MapSizes& x) {
    const int64_t groups = at(kGroups);
    check_size(op_, "groups", groups, 1);
    FR_CHECK_VALUE(x.c % groups == 0, op_, ": groups: expected a divisor of ", x.c,
                   " channels, got ", groups);
    const std::array<int64_t, 4> weight{at(kOutChannels), x.c / groups, at(kKernelH), at(kKernelW)};
    ConvForward& f = step.conv;
    f.shape =
        conv_shape(op_, x.shape(), weight, pair(kStrideH), pair(kPadH), pair(kDilationH), groups);
    FR_CHECK_VALUE(at(kWinograd) == 0 || at(kWinograd) == 1, op_,
                   ": winograd: expected 0 or 1, got ", at(kWinograd));
    step.winograd = at(kWinograd) == 1;
    const Tensor *packed = tensors(3), *scale = packed + 1, *shift = packed + 2;
    check_packed(op_, f.shape, like_, *packed, *scale, *shift);
    f.packed = data(*packed);
    f.scale = data(*scale);
    f.shift = data(*shift);
    f.activation = step.activation;
    step.weight_bytes = static_cast<int64_t>(packed->nbytes());
    const MapSizes y{x.n, f.shape.k, f.shape.out_h(), f.shape.out_w(), false};
    if (step.residual >= 0) check_residual(step, y);
    return y;
  }

  void check_residual(const Step& step, const MapSizes& y) {
    const std::vector<int64_t> expected = y.shape();
    const std::vector<int64_t> got = program_.values[static_cast<size_t>(step.residual)].shape();
    FR_CHECK_VALUE(expected == got, op_, ": residual: expected shape ", IntArrayRef(expected),
                   ", got ", IntArrayRef(got));
  }

  MapSizes pool(Step& step, const MapSizes& x, Field kernel, Field stride, Field padding,
                bool ceil_mode) {
    FR_CHECK_VALUE(x.h > 0 && x.w > 0, op_, ": x: expected a map with pixels, got ",
                   IntArrayRef(x.shape()));
    step.pool = checked_pool(op_, {x.n, x.c, x.h, x.w}, pair(kernel), pair(stride), pair(padding),
                             ceil_mode);
    return {x.n, x.c, step.pool.out_h(), step.pool.out_w(), false};
  }

  MapSizes zero_pad(Step& step, const MapSizes& x) {
    check_pair(op_, "stride", pair(kStrideH), 1);
    check_size(op_, "zeros", at(kZeros), 0);
    // Strides beyond the map are normalised, as in conv_shape.
    const int64_t stride_h = std::min(at(kStrideH), std::max<int64_t>(x.h, 1));
    const int64_t stride_w = std::min(at(kStrideW), std::max<int64_t>(x.w, 1));
    const ZeroPad pad{x.h, x.w, x.c, at(kZeros), stride_h, stride_w};
    step.pad = pad;
    check_numel(op_, "result", {pad.out_c(), pad.out_h(), pad.out_w(), x.n});
    return {x.n, pad.out_c(), pad.out_h(), pad.out_w(), false};
  }

  MapSizes linear(Step& step, const MapSizes& x) {
    FR_CHECK_VALUE(x.h == 1 && x.w == 1, op_, ": x: expected shape (N, C) or (N, C, 1, 1), got ",
                   IntArrayRef(x.shape()));
    const Tensor *weight = tensors(2), *bias = weight + 1;
    const int64_t k = at(kOutChannels);
    check_size(op_, "out_channels", k, 1);
    check_same(op_, "weight", *weight, {k, x.c}, like_);
    check_same(op_, "bias", *bias, {k}, like_);
    check_numel(op_, "result", {k, x.n});
    step.linear = {x.c, k, nullptr, data(*weight), data(*bias), nullptr, step.activation};
    step.weight_bytes = static_cast<int64_t>(weight->nbytes());
    return {x.n, k, 1, 1, true};
  }

  // The first of the step's `count` tensors.
  const Tensor* tensors(int64_t count) const {
    const int64_t size = static_cast<int64_t>(tensors_.size());
    FR_CHECK_VALUE(at(kTensor) >= 0 && at(kTensor) <= size - count, op_, ": tensors: expected ",
                   count, " from index ", at(kTensor), " on, got ", size, " in all");
    return &tensors_[static_cast<size_t>(at(kTensor))];
  }

  const void* data(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    return program_.copies.emplace_back(t.contiguous()).const_data_ptr();
  }
};

}  // namespace

int64_t CheckedProgram::image_bytes(int64_t value) const {
  return values[static_cast<size_t>(value)].image_numel() * bytes_of(dtype);
}

CheckedProgram check_program(const char* op, IntArrayRef sizes, const Tensor& like,
                             TensorList tensors, IntArrayRef steps, IntArrayRef outputs) {
  const char* all = op ? op : kRunProgram;
  FR_CHECK_VALUE(sizes.size() == 4, all, ": x: expected 4 dimensions (N, C, H, W), got ", sizes);
  for (const int64_t size : sizes) check_size(all, "x", size, 0);
  check_numel(all, "x", {sizes[0], sizes[1], sizes[2], sizes[3]});
  FR_CHECK_VALUE(!steps.empty() && steps.size() % kNumFields == 0, all,
                 ": steps: expected a positive multiple of ", static_cast<int64_t>(kNumFields),
                 " ints, got ", steps.size());
  const size_t count = steps.size() / kNumFields;
  CheckedProgram program;
  program.type = like.scalar_type();
  program.dtype = dtype_of(like.scalar_type());
  program.values.reserve(count + 1);
  program.steps.reserve(count);
  program.values.push_back({sizes[0], sizes[1], sizes[2], sizes[3], false});
  Checker checker(op, like, tensors, program);
  for (size_t i = 0; i < count; ++i) checker.add(steps.data() + i * kNumFields);
  FR_CHECK_VALUE(!outputs.empty(), all, ": outputs: expected at least one value");
  std::vector<bool> listed(count + 1, false);
  for (const int64_t value : outputs) {
    FR_CHECK_VALUE(value >= 1 && value <= static_cast<int64_t>(count), all,
                   ": outputs: expected values from 1 to ", count, ", got ", value);
    FR_CHECK_VALUE(!listed[static_cast<size_t>(value)], all, ": outputs: expected each value ",
                   "once, got ", value, " again");
    listed[static_cast<size_t>(value)] = true;
  }
  program.outputs = to_vector(outputs);
  return program;
}

}  // namespace fr
