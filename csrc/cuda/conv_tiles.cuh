// The table of tiles, and the launcher of one precision. Each precision is compiled in a file of
// its own, so that a build runs in parallel.
#pragma once

#include "conv_bn_add_relu.h"
#include "kernels/conv_bn_add_relu.cuh"

namespace fr {

//                     m, n, warps, stages, blocks
template <class Precision>
struct Tiles {
  using Large = Tile<128, 128, 2, 4, 4, 2>;
  using Tall = Tile<128, 64, 2, 2, 4, 3>;
  using Small = Tile<64, 64, 2, 2, 3, 4>;
};

// CUDA cores hold the operands of four products in registers where tensor cores hold one fragment;
// with the same number of registers the larger tiles would spill.
template <>
struct Tiles<Float32> : Tiles<void> {
  using Large = Tile<128, 128, 2, 4, 4, 1>;
  using Tall = Tile<128, 64, 2, 2, 4, 2>;
};

// A choice of an instance of the kernel.
struct ConvLaunch {
  ConvParams params;
  int tile;
  int splits;
  bool vector;  // whether x and the filters allow 16 bytes at a time
  Epilogue epilogue;
};

template <class Precision>
cudaError_t launch_conv(const ConvLaunch& call, cudaStream_t stream);

}  // namespace fr
