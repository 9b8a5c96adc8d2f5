// A frozen residual block, depth-first: some images go through the whole block before the next do.
//
// What a convolution leaves is then still in the cache when the next one reads it. A part's maps
// fill a share of the last cache, not of the L2: bands of rows that fit the L2 were measured at
// ResNet-50's stages 1 to 3 and gained nothing (390 ns a pixel against 390 to 420), as their halo
// costs what they save and a convolution's own blocks are of the L2's size already. The maps
// between the convolutions lie in memory that the thread's next block uses again; a shortcut's map
// lies where the result will, and the last convolution adds to it in place.
//
// A row is blocks one after another. It is an operator of its own because of what a call costs: 7
// us for each block of a network whose blocks take 40.
#include "../residual_block.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "conv_bn_add_relu.h"
#include "map_pool.h"
#include "scratch.h"

namespace fr {
namespace {

constexpr const char* kOp = "residual_block";

// Bytes of maps that one part of the batch has at most, unless one image has more: of a last cache
// of 32 MiB, room for two threads' weights and for others.
constexpr int64_t kPartBytes = 16 * 1024 * 1024;

// Scratch begins at a cache line.
int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t input_numel(const ConvShape& s) { return s.h * s.w * s.c; }
int64_t output_numel(const ConvShape& s) { return s.out_h() * s.out_w() * s.k; }

std::vector<int64_t> result_of(const ConvShape& s) { return {s.n, s.k, s.out_h(), s.out_w()}; }

// A convolution of the block, whatever its maps.
struct Step {
  ConvCall call;
  bool winograd;

  const ConvShape& shape() const { return call.args.shape; }

  void run(int64_t images, const void* x, const void* residual, void* y, bool relu) const {
    ConvForward f = call.args;
    f.shape.n = images;
    f.x = x;
    f.residual = residual;
    f.y = y;
    f.relu = relu;
    run_conv(call.dtype, f, winograd);
  }
};

// The sizes of the convolution of the block behind `before`.
ConvShape next_shape(const ConvShape& before, const BlockConv& c) {
  return {before.n,          before.out_h(),    before.out_w(), before.k,    c.weight_shape[0],
          c.weight_shape[2], c.weight_shape[3], c.stride[0],    c.stride[1], c.padding[0],
          c.padding[1],      c.dilation[0],     c.dilation[1],  c.groups};
}

// A shortcut without parameters: every `stride`th pixel, and `channels` of zeros on both sides.
struct Padding {
  int64_t channels, stride;

  bool is_identity() const { return channels == 0 && stride == 1; }

  std::vector<int64_t> result(const at::Tensor& x) const {
    const auto subsampled = [&](int64_t size) { return (size + stride - 1) / stride; };
    return {x.size(0), x.size(1) + 2 * channels, subsampled(x.size(2)), subsampled(x.size(3))};
  }

  // Of `images` images, as they lie in channels-last maps of `x`'s and the result's sizes.
  void run(int64_t images, const at::Tensor& like, const char* x, char* y) const {
    const int64_t element = like.element_size(), w = like.size(3);
    const std::vector<int64_t> out = result(like);
    const int64_t from = like.size(1) * element, zeros = channels * element, to = out[1] * element;
    at::parallel_for(0, images * out[2], kRowsAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t image = row / out[2], line = row % out[2] * stride;
        const char* pixel = x + (image * like.size(2) + line) * w * from;
        char* at = y + row * out[3] * to;
        for (int64_t i = 0; i < out[3]; ++i, pixel += stride * from, at += to) {
          std::memset(at, 0, zeros);
          std::memcpy(at + zeros, pixel, from);
          std::memset(at + zeros + from, 0, zeros);
        }
      }
    });
  }

 private:
  // A row takes about a microsecond, as starting a thread does.
  static constexpr int64_t kRowsAtOnce = 32;
};

class BlockCall {
 public:
  BlockCall(const at::Tensor& x, const Block& block, bool winograd, const Padding& padding = {0, 1})
      : x_(x.contiguous(kChannelsLast)), padding_(padding) {
    const auto step = [&](const BlockConv& c, const ConvShape& shape) {
      return Step{hold_packed(kOp, shape, x, c.packed, c.scale, c.shift), winograd};
    };
    for (const BlockConv& c : block.convs) {
      const ConvShape shape = steps_.empty() ? shape_on_x(c) : next_shape(steps_.back().shape(), c);
      TORCH_CHECK_VALUE(shape.k % shape.groups == 0, kOp, ": groups: expected a divisor of the ",
                        shape.k, " output channels, got ", shape.groups);
      steps_.push_back(step(c, shape));
    }
    std::vector<int64_t> residual = padding.result(x);
    if (block.shortcut) {
      shortcut_ = step(*block.shortcut, shape_on_x(*block.shortcut));
      residual = result_of(shortcut_->shape());
    }
    const std::vector<int64_t> result = result_of(steps_.back().shape());
    TORCH_CHECK_VALUE(residual == result, kOp, ": residual: expected shape ",
                      at::IntArrayRef(result), ", got ", at::IntArrayRef(residual));
  }

  at::Tensor run() const {
    const at::Tensor y = empty_map(result_of(steps_.back().shape()), x_.options());
    if (y.numel() == 0) return y;
    const int64_t element = x_.element_size(), images = x_.size(0);
    const int64_t in = input_numel(steps_.front().shape()) * element;
    const int64_t out = output_numel(steps_.back().shape()) * element;
    int64_t between = 0;  // of the largest map between two convolutions
    for (size_t i = 0; i + 1 < steps_.size(); ++i)
      between = std::max(between, output_numel(steps_[i].shape()) * element);
    const int64_t maps = in + out + 2 * between;
    const int64_t parts = std::min((images * maps + kPartBytes - 1) / kPartBytes, images);
    const int64_t most = (images + parts - 1) / parts;
    const int64_t half = rounded(most * between);
    Scratch scratch;
    char* const here = scratch.at_least(2 * half);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t n0 = images * part / parts, n1 = images * (part + 1) / parts;
      run_part(n1 - n0, static_cast<const char*>(x_.const_data_ptr()) + n0 * in, here, here + half,
               static_cast<char*>(y.mutable_data_ptr()) + n0 * out);
    }
    return y;
  }

 private:
  at::Tensor x_;
  std::vector<Step> steps_;
  std::optional<Step> shortcut_;
  Padding padding_;

  ConvShape shape_on_x(const BlockConv& c) const {
    return conv_shape(kOp, x_, c.weight_shape, c.stride, c.padding, c.dilation, c.groups);
  }

  void run_part(int64_t images, const char* x, char* here, char* there, char* y) const {
    const bool identity = !shortcut_ && padding_.is_identity();
    if (shortcut_) {
      shortcut_->run(images, x, nullptr, y, false);
    } else if (!identity) {
      padding_.run(images, x_, x, y);
    }
    const char* h = x;
    for (size_t i = 0; i + 1 < steps_.size(); ++i) {
      steps_[i].run(images, h, nullptr, here, true);
      h = here;
      std::swap(here, there);
    }
    steps_.back().run(images, h, identity ? x : y, y, true);
  }
};

// `joined` is for devices that add two convolutions in one kernel.
at::Tensor residual_block_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                              at::TensorList shift, const OptionalTensor&, const OptionalTensor&,
                              bool bottleneck, int64_t stride, int64_t dilation, int64_t groups,
                              bool winograd) {
  const Block block = take_apart(x, packed, scale, shift, bottleneck, stride, dilation, groups);
  return BlockCall(x, block, winograd).run();
}

at::Tensor residual_row_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                            at::TensorList shift, at::IntArrayRef convs,
                            const c10::List<bool>& projected, at::IntArrayRef padding,
                            at::IntArrayRef stride, at::IntArrayRef dilation,
                            at::IntArrayRef groups, const c10::List<bool>& winograd) {
  const char* op = "residual_row";
  const size_t blocks = convs.size();
  TORCH_CHECK_VALUE(blocks > 0, op, ": convs: expected at least one block");
  for (const size_t given : {projected.size(), padding.size(), stride.size(), dilation.size(),
                             groups.size(), winograd.size()}) {
    TORCH_CHECK_VALUE(given == blocks, op, ": expected an element for each of ", blocks,
                      " blocks in every list, got ", given);
  }
  at::Tensor y = x;
  size_t at = 0;
  for (size_t i = 0; i < blocks; ++i) {
    TORCH_CHECK_VALUE(convs[i] == 2 || convs[i] == 3, op, ": convs: expected 2 or 3, got ",
                      convs[i]);
    TORCH_CHECK_VALUE(padding[i] >= 0 && (padding[i] == 0 || !projected[i]), op,
                      ": padding: expected none beside a projection, and else at least 0, got ",
                      padding[i]);
    const size_t count = static_cast<size_t>(convs[i]) + projected[i];
    for (const at::TensorList& list : {packed, scale, shift}) {
      TORCH_CHECK_VALUE(at + count <= list.size(), op, ": expected at least ", at + count,
                        " tensors in every list, got ", list.size());
    }
    const Block block =
        take_apart(y, packed.slice(at, count), scale.slice(at, count), shift.slice(at, count),
                   convs[i] == 3, stride[i], dilation[i], groups[i]);
    const Padding shortcut{padding[i], projected[i] ? 1 : stride[i]};
    y = BlockCall(y, block, winograd[i], shortcut).run();
    at += count;
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("residual_block", &residual_block_cpu);
  m.impl("residual_row", &residual_row_cpu);
}

}  // namespace fr
