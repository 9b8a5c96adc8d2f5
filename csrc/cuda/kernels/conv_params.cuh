// The parameters of the convolution kernels, as plain numbers that host code fills in.
#pragma once

#include <cstdint>

#include "../../activation.h"

namespace fr {

// An NHWC map and the geometry of the window on it. One image has less than 2^31 elements; the
// batch may have more.
struct ConvImage {
  const void* x;
  int h, w, c;  // of the map; c is also the distance between pixels
  int kh, kw;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// The affine step after a convolution, per output channel. With live batch norm:
// scale = weight / sqrt(var + eps), shift = bias + (conv_bias - mean) scale; without `var`, scale
// is `weight` and shift is `bias`. Null pointers stand for 1 (weight) and 0 (all others).
struct ConvAffine {
  const float* weight;
  const float* bias;
  const float* mean;
  const float* var;
  const float* conv_bias;
  float eps;
};

// y = activation(sum * scale + shift + residual * residual_scale + residual_shift)
struct ConvEpilogue {
  ConvAffine affine;
  const void* residual;         // NHWC as y, or null
  const float* residual_scale;  // null for 1
  const float* residual_shift;  // null for 0
  void* y;
  int k;  // channels of y
  Activation activation;
  bool vector;  // whether y, residual and each group's channels allow 16 bytes at a time
};

struct ConvParams {
  ConvImage image;
  ConvImage second;    // input of a second, 1x1 convolution in the same sum; c = 0 for none
  const void* weight;  // [k][kh][kw][group_c], each filter followed by second.c weights
  ConvEpilogue epilogue;
  float* partial;     // [split][rows][k] sums of parts of the depth, or null
  float* statistics;  // [slabs][2][k]: mean and sum of squared differences, or null
  int rows;           // pixels of y in all images
  int out_h, out_w;
  int group_c, group_k;
  int depth;    // terms in a sum
  int tiles_n;  // number of tiles that cover the channels of one group
  int steps_per_split;
};

}  // namespace fr
