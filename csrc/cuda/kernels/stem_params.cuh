// The parameters of the stem's kernel, as plain numbers that host code fills in.
#pragma once

#include "conv_params.cuh"

namespace fr {

struct PoolWindow {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

struct StemParams {
  ConvImage image;
  PoolWindow pool;
  ConvAffine affine;
  Activation activation;
  const void* weight;  // [k][kh][kw][c]
  void* y;             // NHWC
  int k;               // channels of y
  int conv_h, conv_w;  // of the convolution's result
  int out_h, out_w;    // of y
  bool vector;         // whether y allows 16 bytes at a time
  bool chunks;         // whether x does: the plan says whether its rows do, and its address must

  // The plan: pooled pixels of a tile, the convolution's pixels under them, and the pixels of x.
  int tile_h, tile_w;
  int conv_rows, conv_cols;
  bool pairs;                   // whether words are pairs of neighbouring elements
  int lead;                     // elements before a kernel row that pair its first one
  int patch_rows, patch_width;  // with the elements that only pair others
  int patch_pitch, patch_size;  // elements from row to row, and of all
  int row_depth;                // lead + kw * c, made even
  int depth;                    // kh * row_depth, made a multiple of 16
  int tiles_y, tiles_x, tiles;  // of an image, and all
};

}  // namespace fr
