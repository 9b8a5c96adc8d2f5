// The sizes of one 2-d convolution, as plain numbers that host functions and kernels share.
#pragma once

#include <cstdint>

namespace fr {

struct ConvShape {
  int64_t n, h, w, c;          // input: images, height, width, channels
  int64_t k, kh, kw;           // output channels, kernel height and width
  int64_t stride_h, stride_w;  // all of these in pixels
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;

  int64_t group_c() const { return c / groups; }
  int64_t group_k() const { return k / groups; }
  int64_t out_h() const { return (h + 2 * pad_h - dilation_h * (kh - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (w + 2 * pad_w - dilation_w * (kw - 1) - 1) / stride_w + 1; }
  // Number of products in one output element.
  int64_t depth() const { return kh * kw * group_c(); }
};

}  // namespace fr
