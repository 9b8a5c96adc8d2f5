// Decomposes the arguments of residual_block into convolutions, for the host functions of all
// devices.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "checks.h"
#include "tensor.h"

namespace fr {

// A packed convolution of the block and the affine step after it. References to elements of the
// operator's lists, because incrementing the reference counts of hundreds of tensors takes time.
struct BlockConv {
  const Tensor& packed;
  const Tensor& scale;
  const Tensor& shift;
  std::array<int64_t, 4> weight_shape;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

struct Block {
  std::vector<BlockConv> convs;
  std::optional<BlockConv> shortcut;
};

// A basic block is 3x3 (with the stride), 3x3; a bottleneck is 1x1, 3x3 (with the stride, dilation
// and groups), 1x1; a projection shortcut is a 1x1 with the stride. `channels` are those of its
// input; the others come from the lengths of the scales.
inline Block decompose(int64_t channels, TensorList packed, TensorList scale, TensorList shift,
                       bool bottleneck, int64_t stride, int64_t dilation, int64_t groups) {
  const char* op = "residual_block";
  const size_t own = bottleneck ? 3 : 2, count = packed.size();
  FR_CHECK_VALUE(count == own || count == own + 1, op, ": packed: expected ", own, " or ", own + 1,
                 " tensors, got ", count);
  FR_CHECK_VALUE(scale.size() == count && shift.size() == count, op, ": scale, shift: expected ",
                 count, " tensors, got ", scale.size(), " and ", shift.size());
  FR_CHECK_VALUE(bottleneck || (dilation == 1 && groups == 1), op,
                 ": dilation, groups: expected 1 in a basic block, got ", dilation, " and ",
                 groups);
  const auto conv = [&](size_t i, int64_t in_channels, int64_t size, int64_t s, int64_t d,
                        int64_t g) -> BlockConv {
    check_size(op, "groups", g, 1);
    FR_CHECK_VALUE(in_channels % g == 0, op, ": groups: expected a divisor of ", in_channels,
                   " channels, got ", g);
    check_storage(op, "scale", scale[i]);
    check_size(op, "dilation", d, 1);
    const int64_t pad = size == 1 ? 0 : d;
    return {packed[i], scale[i],   shift[i], {scale[i].numel(), in_channels / g, size, size},
            {s, s},    {pad, pad}, {d, d},   g};
  };
  Block block;
  block.convs.reserve(own);
  const int64_t c = channels;
  if (bottleneck) {
    block.convs.push_back(conv(0, c, 1, 1, 1, 1));
    block.convs.push_back(conv(1, scale[0].numel(), 3, stride, dilation, groups));
    block.convs.push_back(conv(2, scale[1].numel(), 1, 1, 1, 1));
  } else {
    block.convs.push_back(conv(0, c, 3, stride, 1, 1));
    block.convs.push_back(conv(1, scale[0].numel(), 3, 1, 1, 1));
  }
  if (count > own) block.shortcut.emplace(conv(own, c, 1, stride, 1, 1));
  return block;
}

}  // namespace fr
