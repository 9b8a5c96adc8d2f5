// The kernels of one instruction set as a table of function pointers, and their arguments: raw
// pointers and plain numbers. Host functions and kernels share this header and conv_shape.h only.
#pragma once

#include <cstdint>

#include "../../activation.h"
#include "../../conv_shape.h"

namespace fr {

enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kNumDTypes };

// A feature map as the batch-norm kernels see it: `rows` dense rows of `cols` elements.
// Channels-last: a row is a pixel and a column a channel. Contiguous (NCHW): a row is the plane of
// one channel of one image, so row r belongs to channel r % channels.
struct MapView {
  int64_t rows, cols, channels;
  bool channels_last;
};

// The per-channel numbers of batch norm are double for float64 and float32 maps, else float.
struct BnForward {
  MapView map;
  const void* x;
  const void* residual;  // null: none
  void* y;
  const void* mean;
  const void* scale;  // weight / sqrt(var + eps)
  const void* bias;
  Activation activation;
};

struct BnStatistics {
  MapView map;
  const void* x;
  double* mean;  // one per channel and chunk: [chunk][channel]
  double* m2;    // sum of squared differences from that mean
};

struct BnBackward {
  MapView map;
  const void* grad;
  const void* x;
  const void* y;  // null: no activation
  Activation activation;
  const void* mean;
  // Reduction: per chunk and channel, [chunk][channel].
  double* sum_dz;
  double* sum_dz_xc;  // of dz * (x - mean)
  void* dz;           // null: do not store it
  // Application: dx = a * dz + b * (x - mean) + c.
  const void* a;
  const void* b;  // null: b and c are zero, and x is not read (inference)
  const void* c;
  void* dx;
};

// activation(scale * conv(x, w) + shift [+ residual]) for channels-last maps. Scale and shift have
// the accumulator's type (double for float64 maps, else float), the packed weight Kernels::packed.
struct ConvForward {
  ConvShape shape;
  const void* x;
  const void* packed;  // see conv_bn_add_relu.h, conv_bfloat16.h
  const void* scale;
  const void* shift;
  const void* residual;  // null: none
  void* y;
  int64_t y_first;  // index of the output pixel that y points to, when y holds only some rows
  Activation activation;
};

// The unit of work of a thread: half-open ranges of images, output rows, output columns and panels
// of output channels.
struct ConvBlock {
  int64_t n0, n1, row0, row1, col0, col1, panel0, panel1;
};

// A pool of one channels-last image, for rows [row0, row1) of the result.
struct PoolForward {
  int64_t h, w, c;  // of the input map
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool ceil_mode;
  const void* x;  // points to row x_first of the input
  int64_t x_first;
  void* y;  // points to row 0 of the result
  int64_t row0, row1;

  int64_t out_h() const { return windows(h, kernel_h, stride_h, pad_h); }
  int64_t out_w() const { return windows(w, kernel_w, stride_w, pad_w); }
  // In ceil_mode the last window may reach beyond the padding, but begins before the map's end.
  int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad) const {
    const int64_t room = size + 2 * pad - kernel;
    if (!ceil_mode) return room / stride + 1;
    const int64_t last = (room + stride - 1) / stride, most = (size + pad - 1) / stride;
    return (last < most ? last : most) + 1;
  }
  // The input rows [first_row(a), end_row(b)) are those that result rows [a, b) need.
  int64_t first_row(int64_t a) const { return a * stride_h > pad_h ? a * stride_h - pad_h : 0; }
  int64_t end_row(int64_t b) const {
    const int64_t end = (b - 1) * stride_h - pad_h + kernel_h;
    return end < h ? end : h;
  }
};

// Averages of all pixels of each image and channel, for a batch of channels-last maps.
struct MeanForward {
  int64_t h, w, c;
  const void* x;
  void* y;  // [image][c]
};

// y = activation(x weight^T + bias), all of the map's type.
struct LinearForward {
  int64_t c, k;
  const void* x;       // [image][c]
  const void* weight;  // [k][c]
  const void* bias;    // [k]
  void* y;             // [image][k]
  Activation activation;
};

// y = activation(x + residual), element by element.
struct AddForward {
  const void* x;
  const void* residual;
  void* y;
  Activation activation;
};

struct Kernels {
  // Chunks are ranges of rows (channels-last) or of channels (contiguous). Their number depends on
  // the shape only, so a sum has the same bits on any number of threads.
  void (*bn_forward)(const BnForward&, int64_t begin, int64_t end);
  void (*bn_statistics)(const BnStatistics&, int64_t begin, int64_t end, int64_t chunk);
  void (*bn_backward_reduce)(const BnBackward&, int64_t begin, int64_t end, int64_t chunk);
  void (*bn_backward_apply)(const BnBackward&, int64_t begin, int64_t end);
  int64_t (*panels)(const ConvShape&);  // number of panels of output channels
  int64_t (*conv_scratch_bytes)(const ConvShape&, const ConvBlock&);
  void (*conv)(const ConvForward&, const ConvBlock&, void* scratch);
  void (*max_pool)(const PoolForward&);
  void (*max_pool_after_relu)(const PoolForward&);  // of a result of conv with ReLU
  void (*avg_pool)(const PoolForward&);
  void (*global_avg_pool)(const MeanForward&, int64_t image, int64_t c0, int64_t c1);
  void (*linear)(const LinearForward&, int64_t k0, int64_t k1, int64_t image0, int64_t image1);
  void (*add_relu)(const AddForward&, int64_t begin, int64_t end);
  // Of elements in place: what conv does not apply, which has ReLU and none.
  void (*activate)(Activation, void* y, int64_t begin, int64_t end);
  void (*pack)(const ConvShape&, bool taps_inside, const void* weight, int64_t panel0,
               int64_t panel1, void* packed);
  void (*unpack)(const ConvShape&, const void* packed, void* weight);  // weight: contiguous
  int64_t (*packed_numel)(const ConvShape&);
  DType packed;  // type of a packed weight, in which the convolution multiplies
};

// Winograd's F(4x4, 3x3) and F(2x2, 3x3), in the order of KernelTable::winograd.
constexpr int64_t kNumWinograds = 2;

// The unit of work of a thread: ranges of tiles, numbered over all images row by row, and of
// panels.
struct WinogradBlock {
  int64_t tile0, tile1, panel0, panel1;
};

struct WinogradKernels {
  int64_t side;    // output pixels along a side of a tile
  int64_t points;  // products per tile and pair of channels
  int64_t lanes;   // input and output channels must be multiples of it
  int64_t (*scratch_bytes)(const ConvShape&, int64_t tiles);
  void (*run)(const ConvForward&, const WinogradBlock&, void* scratch);  // null: not available
};

// Loops that measure the peak throughput of one core; see peak.h.
struct PeakKernels {
  double (*multiply_add_float32)(int64_t iterations);
  double (*multiply_add_float64)(int64_t iterations);
  double (*dot_bfloat16)(int64_t iterations);  // null: not in this instruction set
  void (*read_memory)(const float* from, int64_t count);
  void (*copy_memory)(const float* from, float* to, int64_t count);
};

struct KernelTable {
  const char* isa;
  int64_t winograd_panel;    // output channels per microkernel, at most
  int64_t tile[kNumDTypes];  // output pixels per microkernel, at most
  Kernels of[kNumDTypes];
  WinogradKernels winograd[kNumDTypes][kNumWinograds];
  PeakKernels peak;
};

const KernelTable& kernel_table_portable();
// Each of these exists where setup.py compiled it: see isa.h.
const KernelTable& kernel_table_avx2();
const KernelTable& kernel_table_avx512();
// Replaces the bfloat16 kernels of AVX-512 by those of AVX512-BF16.
namespace avx512_bf16 {
void replace_bfloat16(KernelTable& table);
}
// Replaces the bfloat16 kernels of AVX512-BF16 by those of AMX; amx_emulated runs the same kernels
// with AMX's instructions in plain C++.
namespace amx {
void replace_bfloat16(KernelTable& table);
}
namespace amx_emulated {
void replace_bfloat16(KernelTable& table);
}

}  // namespace fr
