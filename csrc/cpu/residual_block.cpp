// Frozen residual blocks on the CPU: programs of one block.
#include "../residual_block.h"

#include <algorithm>

#include "../box.h"
#include "../checks.h"
#include "../program.h"
#include "../tensor.h"
#include "folding.h"
#include "run_program.h"

namespace fr {
namespace {

// The steps of a block and their tensors.
class BlockSteps {
 public:
  BlockSteps(const Block& block, bool winograd, Activation activation) {
    int64_t h = 0, residual = 0;
    if (block.shortcut) residual = conv(*block.shortcut, 0, -1, Activation::kNone, winograd);
    for (size_t i = 0; i + 1 < block.convs.size(); ++i)
      h = conv(block.convs[i], h, -1, activation, winograd);
    conv(block.convs.back(), h, residual, activation, winograd);
  }

  Tensor run(const Tensor& x) const {
    return run_as_program("residual_block", x, tensors_, steps_);
  }

 private:
  std::vector<int64_t> steps_;
  std::vector<Tensor> tensors_;

  // Adds a step and returns its value.
  int64_t conv(const BlockConv& c, int64_t input, int64_t residual, Activation activation,
               bool winograd) {
    steps_.resize(steps_.size() + kNumFields, 0);
    int64_t* const fields = steps_.data() + steps_.size() - kNumFields;
    fields[kOperation] = kConv;
    fields[kInput] = input;
    fields[kResidual] = residual;
    fields[kTensor] = static_cast<int64_t>(tensors_.size());
    fields[kActivation] = static_cast<int64_t>(activation);
    fields[kKernelH] = c.weight_shape[2];
    fields[kKernelW] = c.weight_shape[3];
    std::copy(c.stride.begin(), c.stride.end(), fields + kStrideH);
    std::copy(c.padding.begin(), c.padding.end(), fields + kPadH);
    std::copy(c.dilation.begin(), c.dilation.end(), fields + kDilationH);
    fields[kGroups] = c.groups;
    fields[kOutChannels] = c.weight_shape[0];
    fields[kWinograd] = winograd;
    for (const Tensor* t : {&c.packed, &c.scale, &c.shift}) tensors_.push_back(*t);
    return static_cast<int64_t>(steps_.size()) / kNumFields;
  }
};

// The two unnamed arguments are for devices that add two convolutions in one kernel.
Tensor residual_block_cpu(const Tensor& x, TensorList packed, TensorList scale, TensorList shift,
                          const OptionalTensor&, const OptionalTensor&, bool bottleneck,
                          int64_t stride, int64_t dilation, int64_t groups, bool winograd,
                          Activation activation) {
  check_map("residual_block", "x", x);
  const Block block =
      decompose(x.size(1), packed, scale, shift, bottleneck, stride, dilation, groups);
  return BlockSteps(block, winograd, activation).run(x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("residual_block", FR_BOX(residual_block_cpu));
}

}  // namespace fr
