// The layers of a network that are not convolutions. Each function is one parallel loop of the
// team, which all of its threads call. Maps are channels-last.
#pragma once

#include <array>

#include "../tensor.h"
#include "isa.h"
#include "thread_team.h"

namespace fr {

// The sizes of a pool of a map (N, C, H, W), without its maps. Throws unless they fit each other.
// ceil_mode: as in torch.nn.MaxPool2d, the last window may reach beyond the padding.
PoolForward checked_pool(const char* op, std::array<int64_t, 4> map, IntArrayRef kernel,
                         IntArrayRef stride, IntArrayRef padding, bool ceil_mode = false);

// A pool of a batch: pool.x is its first image, and y its result.
using PoolKernel = void (*)(const PoolForward&);
void run_pool(ThreadTeam& team, DType dtype, PoolKernel kernel, int64_t images,
              const PoolForward& pool, void* y);

// A shortcut without parameters: every stride-th pixel, with `zeros` zero channels added before and
// after those of x.
struct ZeroPad {
  int64_t h, w, c;  // of x
  int64_t zeros, stride_h, stride_w;

  int64_t out_h() const { return (h + stride_h - 1) / stride_h; }
  int64_t out_w() const { return (w + stride_w - 1) / stride_w; }
  int64_t out_c() const { return c + 2 * zeros; }
};
void run_zero_pad(ThreadTeam& team, DType dtype, int64_t images, const ZeroPad& pad, const void* x,
                  void* y);

void run_global_avg_pool(ThreadTeam& team, DType dtype, int64_t images, const MeanForward& f);
void run_linear(ThreadTeam& team, DType dtype, int64_t images, const LinearForward& f);
void run_add_relu(ThreadTeam& team, DType dtype, int64_t numel, const AddForward& f);

}  // namespace fr
