// A frozen residual block, depth-first: some images go through the whole block before the next do.
//
// What a convolution leaves is then still in the cache when the next one reads it. A part's maps
// fill a share of the last cache, not of the L2: bands of rows that fit the L2 were measured at
// ResNet-50's stages 1 to 3 and gained nothing (390 ns a pixel against 390 to 420), as their halo
// costs what they save and a convolution's own blocks are of the L2's size already. The maps
// between the convolutions lie in memory that the thread's next block uses again; a shortcut's map
// lies where the result will, and the last convolution adds to it in place.
//
// A row is blocks one after another. It is an operator of its own because of what a call costs, 7
// us for each block of a network whose blocks take 40; and its threads part only when all is done.
#include "../residual_block.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "../checks.h"
#include "conv_bn_add_relu.h"
#include "result_cache.h"
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

// A convolution of the block, whatever its maps; it owns no more than it must.
class Step {
 public:
  Step(const BlockConv& c, const ConvShape& shape, const at::Tensor& like, bool winograd)
      : packed_(c.packed.expect_contiguous()),
        scale_(c.scale.expect_contiguous()),
        shift_(c.shift.expect_contiguous()),
        dtype_(dtype_of(like.scalar_type())),
        winograd_(winograd) {
    check_packed(kOp, shape, like, c.packed, c.scale, c.shift);
    args_.shape = shape;
    args_.packed = packed_->const_data_ptr();
    args_.scale = scale_->const_data_ptr();
    args_.shift = shift_->const_data_ptr();
  }

  const ConvShape& shape() const { return args_.shape; }

  void run(Worker& worker, int64_t images, const void* x, const void* residual, void* y,
           bool relu) const {
    ConvForward f = args_;
    f.shape.n = images;
    f.x = x;
    f.residual = residual;
    f.y = y;
    f.relu = relu;
    run_conv(worker, dtype_, f, winograd_);
  }

 private:
  c10::MaybeOwned<at::Tensor> packed_, scale_, shift_;
  ConvForward args_{};
  DType dtype_;
  bool winograd_;
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
  void run(Worker& worker, int64_t images, const at::Tensor& like, const char* x, char* y) const {
    const int64_t element = like.element_size(), w = like.size(3);
    const std::vector<int64_t> out = result(like);
    const int64_t from = like.size(1) * element, zeros = channels * element, to = out[1] * element;
    worker.loop(images * out[2], kRowsAtOnce, [&](int64_t begin, int64_t end) {
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
  // A row takes about a microsecond.
  static constexpr int64_t kRowsAtOnce = 32;
};

// A block on a map, checked; x and the lists outlive it.
class BlockCall {
 public:
  BlockCall(const at::Tensor& x, const Block& block, bool winograd, const Padding& padding = {0, 1})
      : x_(x.expect_contiguous(kChannelsLast)), padding_(padding) {
    for (const BlockConv& c : block.convs) {
      const ConvShape shape =
          steps_.empty() ? shape_on(x, c) : next_shape(steps_.back().shape(), c);
      TORCH_CHECK_VALUE(shape.k % shape.groups == 0, kOp, ": groups: expected a divisor of the ",
                        shape.k, " output channels, got ", shape.groups);
      steps_.emplace_back(c, shape, x, winograd);
    }
    std::vector<int64_t> residual = padding.result(x);
    if (block.shortcut) {
      shortcut_.emplace(*block.shortcut, shape_on(x, *block.shortcut), x, winograd);
      residual = result_of(shortcut_->shape());
    }
    TORCH_CHECK_VALUE(residual == result(), kOp, ": residual: expected shape ",
                      at::IntArrayRef(result()), ", got ", at::IntArrayRef(residual));
  }

  std::vector<int64_t> result() const { return result_of(steps_.back().shape()); }

  // What run wants of scratch.
  int64_t scratch_bytes() const { return 2 * half(); }

  // To the map y; all workers of a team together.
  void run(Worker& worker, char* scratch, char* y) const {
    const int64_t parts = this->parts(), images = x_->size(0), element = x_->element_size();
    const int64_t in = input_numel(steps_.front().shape()) * element;
    const int64_t out = output_numel(steps_.back().shape()) * element;
    const char* x = static_cast<const char*>(x_->const_data_ptr());
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t n0 = images * part / parts, n1 = images * (part + 1) / parts;
      run_part(worker, n1 - n0, x + n0 * in, scratch, scratch + half(), y + n0 * out);
    }
  }

 private:
  c10::MaybeOwned<at::Tensor> x_;
  c10::SmallVector<Step, 3> steps_;
  std::optional<Step> shortcut_;
  Padding padding_;

  static ConvShape shape_on(const at::Tensor& x, const BlockConv& c) {
    return conv_shape(kOp, x, c.weight_shape, c.stride, c.padding, c.dilation, c.groups);
  }

  // Of an image's largest map between two convolutions.
  int64_t bytes_between() const {
    int64_t most = 0;
    for (size_t i = 0; i + 1 < steps_.size(); ++i)
      most = std::max(most, output_numel(steps_[i].shape()));
    return most * x_->element_size();
  }

  // Of the batch.
  int64_t parts() const {
    const int64_t ends = input_numel(steps_.front().shape()) + output_numel(steps_.back().shape());
    const int64_t bytes = ends * x_->element_size() + 2 * bytes_between(), images = x_->size(0);
    return std::min((images * bytes + kPartBytes - 1) / kPartBytes, images);
  }

  int64_t half() const {
    const int64_t parts = std::max<int64_t>(this->parts(), 1);
    return rounded((x_->size(0) + parts - 1) / parts * bytes_between());
  }

  void run_part(Worker& worker, int64_t images, const char* x, char* here, char* there,
                char* y) const {
    const bool identity = !shortcut_ && padding_.is_identity();
    if (shortcut_) {
      shortcut_->run(worker, images, x, nullptr, y, false);
    } else if (!identity) {
      padding_.run(worker, images, *x_, x, y);
    }
    const char* h = x;
    for (size_t i = 0; i + 1 < steps_.size(); ++i) {
      steps_[i].run(worker, images, h, nullptr, here, true);
      h = here;
      std::swap(here, there);
    }
    steps_.back().run(worker, images, h, identity ? x : y, y, true);
  }
};

// Blocks one after another, all checked before the first runs, and then run by one team.
class RowCall {
 public:
  explicit RowCall(const at::Tensor& x) : maps_{x} {}

  // The map that the next block goes on.
  const at::Tensor& end() const { return maps_.back(); }

  void add(const Block& block, bool winograd, const Padding& padding = {0, 1}) {
    const BlockCall& call = calls_.emplace_back(end(), block, winograd, padding);
    const std::vector<int64_t> sizes = call.result();
    // The map before the block's own is no longer needed then, but x is the caller's.
    const bool again = maps_.size() > 2 && maps_[maps_.size() - 2].sizes() == sizes;
    maps_.push_back(again ? maps_[maps_.size() - 2] : empty_map(sizes, end().options()));
  }

  at::Tensor run() const {
    if (end().numel() == 0) return end();
    int64_t most = 0;
    for (const BlockCall& call : calls_) most = std::max(most, call.scratch_bytes());
    Scratch scratch;
    char* const between = scratch.at_least(most);
    in_team([&](Worker& worker) {
      for (size_t i = 0; i < calls_.size(); ++i)
        calls_[i].run(worker, between, static_cast<char*>(maps_[i + 1].mutable_data_ptr()));
    });
    return end();
  }

 private:
  std::deque<at::Tensor> maps_;  // the calls refer to them
  std::deque<BlockCall> calls_;
};

// `joined` is for devices that add two convolutions in one kernel.
at::Tensor residual_block_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                              at::TensorList shift, const OptionalTensor&, const OptionalTensor&,
                              bool bottleneck, int64_t stride, int64_t dilation, int64_t groups,
                              bool winograd) {
  const Block block = take_apart(x, packed, scale, shift, bottleneck, stride, dilation, groups);
  RowCall call(x);
  call.add(block, winograd);
  return call.run();
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
  RowCall call(x);
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
        take_apart(call.end(), packed.slice(at, count), scale.slice(at, count),
                   shift.slice(at, count), convs[i] == 3, stride[i], dilation[i], groups[i]);
    call.add(block, winograd[i], Padding{padding[i], projected[i] ? 1 : stride[i]});
    at += count;
  }
  return call.run();
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("residual_block", &residual_block_cpu);
  m.impl("residual_row", &residual_row_cpu);
}

}  // namespace fr
