// The numbers of a batch norm in training, per channel and in float64:
//   scale = weight / sqrt(var + eps),  shift = bias - mean * scale;
//   running = running + momentum * (batch - running), of the mean and of the unbiased variance;
//   a = weight / std,  b = -a * sum g (z - mean) / (m * std^2),  c = -a * sum g / m - b * mean
//   of dz = a * g + b * z + c, with dweight = sum g (z - mean) / std and dbias = sum g.
//
// A few thousand numbers, whose cost is the launch: a thread for each channel.
//
// Occupancy designed for: whatever comes; the grid is a handful of blocks.
#pragma once

#include "../device.cuh"
#include "bn_params.cuh"

namespace fr {

__global__ void __launch_bounds__(kBnThreads)
    bn_coefficients_kernel(const __grid_constant__ BnCoefficientsParams p) {
  const int c = blockIdx.x * kBnThreads + threadIdx.x;
  if (c >= p.channels) return;
  const double scale = (p.weight ? p.weight[c] : 1.0) / sqrt(p.var[c] + p.eps);
  p.scale[c] = static_cast<float>(scale);
  p.shift[c] = static_cast<float>((p.bias ? p.bias[c] : 0.0) - p.mean[c] * scale);
}

__global__ void __launch_bounds__(kBnThreads)
    bn_update_running_kernel(const __grid_constant__ BnUpdateRunningParams p) {
  const int c = blockIdx.x * kBnThreads + threadIdx.x;
  if (c >= p.channels) return;
  float& mean = p.running_mean[c * p.mean_step];
  float& var = p.running_var[c * p.var_step];
  mean = static_cast<float>(mean + p.momentum * (double{p.mean[c]} - mean));
  var = static_cast<float>(var + p.momentum * (p.var[c] * p.unbiased - var));
}

__global__ void __launch_bounds__(kBnThreads)
    bn_backward_coefficients_kernel(const __grid_constant__ BnBackwardCoefficientsParams p) {
  const int i = blockIdx.x * kBnThreads + threadIdx.x;
  if (i >= p.channels) return;
  const double g = p.sum_g[i], g_xc = p.sum_g_xc[i];
  const double invstd = 1.0 / sqrt(p.var[i] + p.eps);
  const double a = invstd * (p.weight ? p.weight[i] : 1.0);
  const double b = -a * invstd * invstd * g_xc / p.count;
  p.a[i] = static_cast<float>(a);
  p.b[i] = static_cast<float>(b);
  p.c[i] = static_cast<float>(-a * g / p.count - b * p.mean[i]);
  p.dweight[i] = static_cast<float>(g_xc * invstd);
  p.dbias[i] = static_cast<float>(g);
}

}  // namespace fr
