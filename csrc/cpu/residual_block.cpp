// Frozen residual blocks, depth-first: the batch is split into micro-batches, each of which goes
// through the whole block before the next one starts.
//
// The output of a convolution is then still in the cache when the next one reads it. The maps of a
// micro-batch fill a share of the L3 cache, not of the L2: bands of rows that fit the L2 gained
// nothing at ResNet-50's stages 1 to 3 (390 ns a pixel against 390 to 420), since their halo costs
// what they save and the blocks of a convolution have the size of the L2 already. The maps between
// the convolutions are in scratch memory that the thread uses again. The map of a shortcut is
// computed where the result will be, and the last convolution adds to it in place.
//
// residual_segment runs a sequence of blocks. It is an operator of its own because a call costs 7
// us, where a block of a small network takes 40, and because its threads stay together for all
// blocks.
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

// Maximum bytes of maps in one micro-batch, unless one image has more: half of an L3 cache of
// 32 MiB, which leaves room for the weights.
constexpr int64_t kMicroBatchBytes = 16 * 1024 * 1024;

// Rounds up to whole cache lines.
int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t input_numel(const ConvShape& s) { return s.h * s.w * s.c; }
int64_t output_numel(const ConvShape& s) { return s.out_h() * s.out_w() * s.k; }

std::vector<int64_t> result_of(const ConvShape& s) { return {s.n, s.k, s.out_h(), s.out_w()}; }

// A convolution of the block, without its maps. It owns copies only of operands that had to be made
// contiguous.
class Step {
 public:
  Step(const BlockConv& c, const ConvShape& shape, const at::Tensor& like, bool winograd)
      : packed_(c.packed.expect_contiguous()),
        scale_(c.scale.expect_contiguous()),
        shift_(c.shift.expect_contiguous()),
        dtype_(dtype_of(like.scalar_type())),
        winograd_(winograd) {
    args_.shape = shape;
    args_.packed = packed_->const_data_ptr();
    args_.scale = scale_->const_data_ptr();
    args_.shift = shift_->const_data_ptr();
  }

  const ConvShape& shape() const { return args_.shape; }

  void run(ThreadTeam& team, int64_t images, const void* x, const void* residual, void* y,
           bool relu) const {
    ConvForward f = args_;
    f.shape.n = images;
    f.x = x;
    f.residual = residual;
    f.y = y;
    f.relu = relu;
    run_conv(team, dtype_, f, winograd_);
  }

 private:
  c10::MaybeOwned<at::Tensor> packed_, scale_, shift_;
  ConvForward args_{};
  DType dtype_;
  bool winograd_;
};

// A shortcut without parameters: every `stride`-th pixel, with `channels` zero channels added
// before and after those of x.
struct Padding {
  int64_t channels, stride;

  bool is_identity() const { return channels == 0 && stride == 1; }

  std::vector<int64_t> result(const at::Tensor& x) const {
    const auto subsampled = [&](int64_t size) { return (size + stride - 1) / stride; };
    return {x.size(0), x.size(1) + 2 * channels, subsampled(x.size(2)), subsampled(x.size(3))};
  }

  // Runs `images` images from x to y, both channels-last; `like` has the sizes of the whole batch.
  void run(ThreadTeam& team, int64_t images, const at::Tensor& like, const char* x, char* y) const {
    const int64_t element = like.element_size(), w = like.size(3);
    const std::vector<int64_t> out = result(like);
    const int64_t from = like.size(1) * element, zeros = channels * element, to = out[1] * element;
    team.parallel_for(images * out[2], kRowsAtOnce, [&](int64_t begin, int64_t end) {
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
  // Minimum rows for each thread; a row takes about a microsecond.
  static constexpr int64_t kRowsAtOnce = 32;
};

// A checked call of one block. x and the lists of operands must outlive it.
class BlockCall {
 public:
  BlockCall(const at::Tensor& x, const Block& block, bool winograd, const Padding& padding = {0, 1})
      : x_(x.expect_contiguous(kChannelsLast)), padding_(padding) {
    for (const BlockConv& c : block.convs) {
      const ConvShape shape = steps_.empty() ? shape_on(x.sizes(), c) : shape_on(result(), c);
      steps_.push_back(checked_step(c, shape, x, winograd));
    }
    std::vector<int64_t> residual = padding.result(x);
    if (block.shortcut) {
      shortcut_ = checked_step(*block.shortcut, shape_on(x.sizes(), *block.shortcut), x, winograd);
      residual = result_of(shortcut_->shape());
    }
    TORCH_CHECK_VALUE(residual == result(), kOp, ": residual: expected shape ",
                      at::IntArrayRef(result()), ", got ", at::IntArrayRef(residual));
  }

  std::vector<int64_t> result() const { return result_of(steps_.back().shape()); }

  // The scratch memory that run needs.
  int64_t scratch_bytes() const { return 2 * half(); }

  // Writes the map y. All threads of a team call it.
  void run(ThreadTeam& team, char* scratch, char* y) const {
    const int64_t parts = micro_batches(), images = x_->size(0), element = x_->element_size();
    const int64_t in = input_numel(steps_.front().shape()) * element;
    const int64_t out = output_numel(steps_.back().shape()) * element;
    const char* x = static_cast<const char*>(x_->const_data_ptr());
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t n0 = images * part / parts, n1 = images * (part + 1) / parts;
      run_micro_batch(team, n1 - n0, x + n0 * in, scratch, scratch + half(), y + n0 * out);
    }
  }

 private:
  c10::MaybeOwned<at::Tensor> x_;
  c10::SmallVector<Step, 3> steps_;
  std::optional<Step> shortcut_;
  Padding padding_;

  static ConvShape shape_on(at::IntArrayRef input, const BlockConv& c) {
    return conv_shape(kOp, input, c.weight_shape, c.stride, c.padding, c.dilation, c.groups);
  }

  static Step checked_step(const BlockConv& c, const ConvShape& shape, const at::Tensor& like,
                           bool winograd) {
    check_packed(kOp, shape, like, c.packed, c.scale, c.shift);
    return {c, shape, like, winograd};
  }

  // Size of an image's largest map between two convolutions.
  int64_t bytes_between() const {
    int64_t most = 0;
    for (size_t i = 0; i + 1 < steps_.size(); ++i)
      most = std::max(most, output_numel(steps_[i].shape()));
    return most * x_->element_size();
  }

  // Number of micro-batches.
  int64_t micro_batches() const {
    const int64_t ends = input_numel(steps_.front().shape()) + output_numel(steps_.back().shape());
    const int64_t bytes = ends * x_->element_size() + 2 * bytes_between(), images = x_->size(0);
    return std::min((images * bytes + kMicroBatchBytes - 1) / kMicroBatchBytes, images);
  }

  int64_t half() const {
    const int64_t parts = std::max<int64_t>(micro_batches(), 1);
    return rounded((x_->size(0) + parts - 1) / parts * bytes_between());
  }

  void run_micro_batch(ThreadTeam& team, int64_t images, const char* x, char* here, char* there,
                       char* y) const {
    const bool identity = !shortcut_ && padding_.is_identity();
    if (shortcut_) {
      shortcut_->run(team, images, x, nullptr, y, false);
    } else if (!identity) {
      padding_.run(team, images, *x_, x, y);
    }
    const char* h = x;
    for (size_t i = 0; i + 1 < steps_.size(); ++i) {
      steps_[i].run(team, images, h, nullptr, here, true);
      h = here;
      std::swap(here, there);
    }
    steps_.back().run(team, images, h, identity ? x : y, y, true);
  }
};

// A sequence of blocks. All are checked before the first one runs; one thread team runs them all.
class SegmentCall {
 public:
  explicit SegmentCall(const at::Tensor& x) : maps_{x} {}

  // The input of the next block.
  const at::Tensor& end() const { return maps_.back(); }

  void add(const Block& block, bool winograd, const Padding& padding = {0, 1}) {
    const BlockCall& call = calls_.emplace_back(end(), block, winograd, padding);
    const std::vector<int64_t> sizes = call.result();
    // The input of the block before is no longer needed by then, unless it is the caller's x.
    const bool again = maps_.size() > 2 && maps_[maps_.size() - 2].sizes() == sizes;
    maps_.push_back(again ? maps_[maps_.size() - 2] : empty_map(sizes, end().options()));
  }

  at::Tensor run() const {
    if (end().numel() == 0) return end();
    int64_t most = 0;
    for (const BlockCall& call : calls_) most = std::max(most, call.scratch_bytes());
    Scratch scratch;
    char* const between = scratch.at_least(most);
    run_on_thread_team([&](ThreadTeam& team) {
      for (size_t i = 0; i < calls_.size(); ++i)
        calls_[i].run(team, between, static_cast<char*>(maps_[i + 1].mutable_data_ptr()));
    });
    return end();
  }

 private:
  std::deque<at::Tensor> maps_;  // a deque, since calls_ hold references to its elements
  std::deque<BlockCall> calls_;
};

// The two unnamed arguments are for devices that add two convolutions in one kernel.
at::Tensor residual_block_cpu(const at::Tensor& x, at::TensorList packed, at::TensorList scale,
                              at::TensorList shift, const OptionalTensor&, const OptionalTensor&,
                              bool bottleneck, int64_t stride, int64_t dilation, int64_t groups,
                              bool winograd) {
  const Block block = decompose(x, packed, scale, shift, bottleneck, stride, dilation, groups);
  SegmentCall call(x);
  call.add(block, winograd);
  return call.run();
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
  SegmentCall call(x);
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
        decompose(call.end(), packed.slice(at, count), scale.slice(at, count),
                  shift.slice(at, count), convs[i] == 3, stride[i], dilation[i], groups[i]);
    call.add(block, winograd[i], Padding{padding[i], projected[i] ? 1 : stride[i]});
    at += count;
  }
  return call.run();
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("residual_block", &residual_block_cpu);
  m.impl("residual_segment", &residual_segment_cpu);
}

}  // namespace fr
