// Shared by the operators that begin with a convolution: checked operands, and the launch.
#pragma once

#include <vector>

#include "../../checks.h"
#include "../../tensor.h"
#include "../conv_bn_add_relu.h"
#include "../residual_block.h"
#include "context.h"
#include "operands.h"

namespace fr {

struct ConvGeometry {
  IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// The precision for the dtype of x; for float32 torch.backends.cudnn.allow_tf32 decides. Raises a
// TypeError for float64.
ConvPrecision conv_precision(const char* op, const Tensor& x);

// Raises a ValueError for sizes that the kernels' 32-bit indices cannot count.
void check_conv_sizes(const char* op, const ConvShape& shape);

// One convolution and its epilogue. Setters check their arguments and keep them alive.
class ConvCall {
 public:
  ConvCall(const char* op, const Tensor& x, IntArrayRef weight_shape, const ConvGeometry& geometry);

  // Of a map and a shape that are checked. Padding and dilation may be negative: a window then
  // begins inside of the map, and its taps go backwards.
  ConvCall(const char* op, const Tensor& x, const ConvShape& shape);

  // A weight in PyTorch's shape, or the flat result of pack_conv_weight, [k][kh][kw][c / groups].
  void set_weight(const Tensor& weight);
  void set_packed(const Tensor& packed);

  // Adds a 1x1 convolution to the same sum; `packed` then has its weights after each filter.
  void set_second(const Tensor& x, IntArrayRef stride);

  void set_batch_norm(const OptionalTensor& conv_bias, const OptionalTensor& weight,
                      const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                      double eps);
  void set_affine(const OptionalTensor& scale, const OptionalTensor& shift);
  void set_residual(const OptionalTensor& residual, const OptionalTensor& scale,
                    const OptionalTensor& shift);
  void set_activation(Activation activation) { params_.epilogue.activation = activation; }

  // Whether channels and addresses are multiples of 16 bytes, as a second convolution requires.
  bool by_packs() const { return conv_by_packs(params_, precision_, aligned_); }

  // Sets the tile and split; -1 leaves the choice to the cost model.
  void set_plan(int64_t tile, int64_t split_k);

  // The result, channels_last.
  Tensor run();

  // Also the mean and the biased variance of the result, for each channel.
  std::vector<Tensor> run_with_statistics();

  // act(conv_1x1(act(this convolution)) * scale + shift + residual) in one kernel. Returns an
  // undefined tensor if no kernel supports the channels.
  Tensor run_then_1x1(const Tensor& packed, const Tensor& scale, const Tensor& shift,
                      const Tensor& residual);

 private:
  ConvPlan plan(bool may_split) const;
  void launch(const ConvPlan& plan);
  Tensor empty_map(int64_t channels);
  const float* vector(const char* name, const OptionalTensor& v, int64_t channels);
  const void* map(const Tensor& t);

  const char* op_;
  Tensor x_;
  Operands operands_;
  DeviceScope scope_;
  ConvShape shape_;
  ConvPrecision precision_;
  ConvParams params_;
  bool aligned_ = true;
  int64_t tile_ = -1, split_k_ = -1;
};

}  // namespace fr
