// The parameters of the batch norm kernels, as plain numbers that host code fills in.
#pragma once

#include <cstdint>

#include "../../activation.h"

namespace fr {

constexpr int kBnThreads = 256;

// A map and how a grid of blocks traverses it. A block processes some channels (blockIdx.x) of a
// slab of consecutive items (blockIdx.y). An item is what one thread loads at a time: consecutive
// channels of one pixel (channels-last), or consecutive pixels of one channel and image
// (contiguous).
struct BnMap {
  int channels;
  int items;            // of one pack of channels (channels-last) or of one channel (contiguous)
  int items_per_image;  // contiguous; 0 says channels-last
  int plane;            // pixels of an image
  int lanes;            // threads along the channels: a power of two, 1 if contiguous
  int slab_items;
  int slabs;
  int groups;  // blocks along the channels
};

// The per-channel numbers of batch norm: scale = weight / sqrt(var + eps); without `var`, scale is
// `weight`. Null pointers stand for 1 (weight) and 0 (mean and bias).
struct BnAffine {
  const float* weight;
  const float* bias;
  const float* mean;
  const float* var;
  float eps;
};

// y = activation((x - mean) * scale + bias [+ residual])
struct BnForwardParams {
  BnMap map;
  BnAffine affine;
  const void* x;
  const void* residual;  // or null
  void* y;
  Activation activation;
};

struct BnStatisticsParams {
  BnMap map;
  const void* x;
  float* pivot;     // [channels]
  float* partials;  // [slabs][2][channels]: mean of x - pivot, sum of squared differences from it
};

// Computes from the slabs the batch's mean and biased variance, and the scale and shift of
// BnAffine.
struct BnStatisticsFinishParams {
  const float* pivot;
  const float* partials;
  const float* weight;  // or null
  const float* bias;    // or null
  float* mean;
  float* var;
  float* scale;
  float* shift;
  int channels, slabs;
  double slab_values, values;  // of one channel: in every slab but the last, and in all
  double eps;
};

struct BnBackwardReduceParams {
  BnMap map;
  const void* grad;
  const void* x;
  const void* y;  // null: no activation
  Activation activation;
  const float* mean;
  void* dz;         // receives the gradient of the activation's argument, unless null
  float* partials;  // [slabs][2][channels][2]: sums of dz and of dz * (x - mean), high and low part
};

// Computes from the slabs dweight = sum(dz * (x - mean)) / std, dbias = sum(dz), and the
// coefficients of dx.
struct BnBackwardFinishParams {
  const float* partials;
  const float* weight;  // or null
  const float* var;     // null: std is 1, and dweight the sum itself
  float* dweight;
  float* dbias;
  float* coefficients;  // [3][channels]: a, b, c; or null
  int channels, slabs;
  double values, eps;
};

// dx = a * dz + b * (x - mean) + c
struct BnBackwardParams {
  BnMap map;
  const void* grad;
  const void* y;  // null: grad is dz
  Activation activation;
  const void* x;      // null: b and c are zero
  const float* mean;  // null: 0
  const float* a;
  const float* b;
  const float* c;
  void* dx;
};

// y = activation(z * scale + shift [+ shortcut * shortcut_scale + shortcut_shift])
struct BlockEndParams {
  BnMap map;
  const void* z;
  const void* shortcut;  // or null
  const float* scale;    // null for 1, as shortcut_scale
  const float* shift;    // null for 0, as shortcut_shift
  const float* shortcut_scale;
  const float* shortcut_shift;
  void* y;
  Activation activation;
};

// The numbers of a batch norm, per channel; weight and bias may be null, for 1 and 0.
struct BnCoefficientsParams {
  const float* mean;
  const float* var;
  const float* weight;
  const float* bias;
  float* scale;
  float* shift;
  int channels;
  double eps;
};

struct BnUpdateRunningParams {
  const float* mean;
  const float* var;
  float* running_mean;
  float* running_var;
  int64_t mean_step, var_step;  // elements from one running number to the next
  int channels;
  double momentum, unbiased;  // var * unbiased is the unbiased variance
};

struct BnBackwardCoefficientsParams {
  const float* sum_g;
  const float* sum_g_xc;
  const float* mean;
  const float* var;
  const float* weight;
  float* a;
  float* b;
  float* c;
  float* dweight;
  float* dbias;
  int channels;
  double count, eps;
};

}  // namespace fr
