// Programs of frozen networks: how the operator run_program takes them, and the object that holds
// its arguments but x.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "tensor.h"

namespace fr {

// What a step computes. The names in Python are in fused_resnet/ops/program_steps.py. Files of
// torch.export store these numbers and the places below: add to them, and never change one.
enum Operation : int64_t {
  kConv,             // activation(scale * conv(input, packed) + shift + residual)
  kConvMaxPool,      // max_pool(activation(scale * conv(input, packed) + shift))
  kMaxPool,          // max_pool(input)
  kZeroPadShortcut,  // every stride-th pixel, with `zeros` zero channels on both sides
  kGlobalAvgPool,    // (N, C, H, W) -> (N, C, 1, 1)
  kLinear,           // (N, C) or (N, C, 1, 1) -> (N, K)
  kAvgPool,          // avg_pool(input), which counts the padding
  kAddRelu,          // activation(input + residual)
  kNumOperations
};

// The places of a step's integers. Value 0 is x, and step i computes value i + 1. What an operation
// does not name is not read.
enum Field : int64_t {
  kOperation,
  kInput,     // value
  kResidual,  // value that is added before the activation; -1: none
  kTensor,  // first of its tensors: packed, scale, shift of a convolution; weight, bias of kLinear
  kActivation,  // a number of activation.h
  kKernelH,     // of the convolution, or of kMaxPool and kAvgPool; so are stride and padding
  kKernelW,
  kStrideH,
  kStrideW,
  kPadH,
  kPadW,
  kDilationH,
  kDilationW,
  kGroups,
  kOutChannels,  // of a convolution or of kLinear
  kWinograd,     // 1: Winograd's algorithm may run
  kPoolKernelH,  // of kConvMaxPool's pool
  kPoolKernelW,
  kPoolStrideH,
  kPoolStrideW,
  kPoolPadH,
  kPoolPadW,
  kZeros,
  kCeilMode,  // 1: the last window of kMaxPool or kAvgPool may reach beyond the padding
  kNumFields
};

struct KeptPlan;

// run_program with all arguments bound but x. Converting them at every call would take as long as a
// small network. A device may keep here what it derived from the arguments.
class Program {
 public:
  using Tensors = std::vector<Tensor>;
  using Ints = std::vector<int64_t>;

  // The operator's arguments after x.
  Program(Tensors tensors, Ints steps, Ints outputs);

  TensorList tensors() const { return tensors_; }
  IntArrayRef steps() const { return steps_; }
  IntArrayRef outputs() const { return outputs_; }

  // The plan of an earlier call, whatever its x was; null: none. Thread-safe.
  std::shared_ptr<const KeptPlan> plan() const;
  void keep(std::shared_ptr<const KeptPlan> plan) const;

 private:
  const Tensors tensors_;
  const Ints steps_, outputs_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const KeptPlan> plan_;
};

// Programs by number, since LibTorch's stable interface passes no objects of other classes.
// Thread-safe.
std::shared_ptr<const Program> kept_program(int64_t number);
void release_program(int64_t number);

}  // namespace fr
