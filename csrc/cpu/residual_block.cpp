// Frozen residual blocks on the CPU: programs of one block, or of several.
#include "../residual_block.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../program.h"
#include "folding.h"
#include "run_program.h"

namespace fr {
namespace {

// The steps of blocks and their tensors.
class BlockSteps {
 public:
  // A block whose input is value x; its result is value last(). A shortcut without parameters adds
  // `zeros` zero channels on each side.
  void add(int64_t x, const Block& block, bool winograd, int64_t zeros = 0, int64_t stride = 1) {
    int64_t residual = x;
    if (block.shortcut) {
      residual = conv(*block.shortcut, x, -1, false, winograd);
    } else if (zeros > 0 || stride > 1) {
      int64_t* fields = begin(kZeroPadShortcut, x);
      fields[kStrideH] = fields[kStrideW] = stride;
      fields[kZeros] = zeros;
      residual = last();
    }
    int64_t h = x;
    for (size_t i = 0; i + 1 < block.convs.size(); ++i)
      h = conv(block.convs[i], h, -1, true, winograd);
    conv(block.convs.back(), h, residual, true, winograd);
  }

  int64_t last() const { return static_cast<int64_t>(steps_.size()) / kNumFields; }

  at::Tensor run(const at::Tensor& x) const {
    return run_as_program("residual_block", x, tensors_, steps_);
  }

 private:
  std::vector<int64_t> steps_;
  std::vector<at::Tensor> tensors_;

  int64_t* begin(Operation operation, int64_t input) {
    steps_.resize(steps_.size() + kNumFields, 0);
    int64_t* fields = steps_.data() + steps_.size() - kNumFields;
    fields[kOperation] = operation;
    fields[kInput] = input;
    return fields;
  }

  int64_t conv(const BlockConv& c, int64_t input, int64_t residual, bool relu, bool winograd) {
    int64_t* fields = begin(kConv, input);
    fields[kResidual] = residual;
    fields[kTensor] = static_cast<int64_t>(tensors_.size());
    fields[kActivation] = relu;
    fields[kKernelH] = c.weight_shape[2];
    fields[kKernelW] = c.weight_shape[3];
    std::copy(c.stride.begin(), c.stride.end(), fields + kStrideH);
    std::copy(c.padding.begin(), c.padding.end(), fields + kPadH);
    std::copy(c.dilation.begin(), c.dilation.end(), fields + kDilationH);
    fields[kGroups] = c.groups;
    fields[kOutChannels] = c.weight_shape[0];
    fields[kWinograd] = winograd;
    for (const at::Tensor* t : {&c.packed, &c.scale, &c.shift}) tensors_.push_back(*t);
    return last();
  }
};

// The two unnamed arguments are for devices that add two convolutions in one kernel.
at::Tensor residual_block_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                              at::TensorList shift, const OptionalTensor&, const OptionalTensor&,
                              bool bottleneck, int64_t stride, int64_t dilation, int64_t groups,
                              bool winograd) {
  check_map("residual_block", "x", x);
  BlockSteps steps;
  steps.add(0, decompose(x.size(1), packed, scale, shift, bottleneck, stride, dilation, groups),
            winograd);
  return steps.run(x);
}

at::Tensor residual_segment_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                                at::TensorList shift, at::IntArrayRef convs,
                                const c10::List<bool>& projected, at::IntArrayRef padding,
                                at::IntArrayRef stride, at::IntArrayRef dilation,
                                at::IntArrayRef groups, const c10::List<bool>& winograd) {
  const char* op = "residual_segment";
  const size_t blocks = convs.size();
  TORCH_CHECK_VALUE(blocks > 0, op, ": convs: expected at least one block");
  for (const size_t size : {projected.size(), padding.size(), stride.size(), dilation.size(),
                            groups.size(), winograd.size()}) {
    TORCH_CHECK_VALUE(size == blocks, op, ": expected an element for each of ", blocks,
                      " blocks in every list, got ", size);
  }
  check_map(op, "x", x);
  BlockSteps steps;
  int64_t channels = x.size(1);
  size_t at = 0;
  for (size_t i = 0; i < blocks; ++i) {
    TORCH_CHECK_VALUE(convs[i] == 2 || convs[i] == 3, op, ": convs: expected 2 or 3, got ",
                      convs[i]);
    check_size(op, "stride", stride[i], 1);
    check_size(op, "padding", padding[i], 0);
    TORCH_CHECK_VALUE(padding[i] == 0 || !projected[i], op,
                      ": padding: expected 0 beside a projection, got ", padding[i]);
    const size_t count = static_cast<size_t>(convs[i]) + projected[i];
    for (const at::TensorList& list : {packed, scale, shift}) {
      TORCH_CHECK_VALUE(at + count <= list.size(), op, ": expected at least ", at + count,
                        " tensors in every list, got ", list.size());
    }
    const Block block =
        decompose(channels, packed.slice(at, count), scale.slice(at, count), shift.slice(at, count),
                  convs[i] == 3, stride[i], dilation[i], groups[i]);
    steps.add(steps.last(), block, winograd[i], padding[i], projected[i] ? 1 : stride[i]);
    channels = block.convs.back().weight_shape[0];
    at += count;
  }
  return steps.run(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("residual_block", &residual_block_cpu);
  m.impl("residual_segment", &residual_segment_cpu);
}

}  // namespace fr
