#include "layers.h"

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "conv_driver.h"

namespace fr {
namespace {

// Minimum rows of pixels for each thread; a row takes about a microsecond.
constexpr int64_t kRowsAtOnce = 32;
constexpr int64_t kPooledRowsAtOnce = 8;

// Channels that a thread averages at a time, and elements that it adds at a time, at least.
constexpr int64_t kAveragedChannels = 256;
constexpr int64_t kAddedElements = 4096;

// Bytes of a linear layer's input that stay in the L2 cache while iterating over all rows of the
// weight.
constexpr int64_t kLinearBytes = 256 * 1024;
// Rows of its weight that a thread takes at a time: a multiple of those of every microkernel.
constexpr int64_t kLinearRowsAtOnce = 8;

}  // namespace

PoolForward checked_pool(const char* op, std::array<int64_t, 4> map, IntArrayRef kernel,
                         IntArrayRef stride, IntArrayRef padding, bool ceil_mode) {
  check_pool(op, map, kernel, stride, padding, ceil_mode);
  PoolForward p{};
  p.c = map[1];
  p.h = map[2];
  p.w = map[3];
  // Windows and strides beyond the padded map are normalised, as in conv_shape.
  p.kernel_h = std::min(kernel[0], p.h + 2 * padding[0]);
  p.kernel_w = std::min(kernel[1], p.w + 2 * padding[1]);
  p.stride_h = std::min(stride[0], p.h + 2 * padding[0]);
  p.stride_w = std::min(stride[1], p.w + 2 * padding[1]);
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  p.ceil_mode = ceil_mode;
  return p;
}

void run_pool(ThreadTeam& team, DType dtype, PoolKernel kernel, int64_t images,
              const PoolForward& pool, void* y) {
  const int64_t rows = pool.out_h(), element = bytes_of(dtype);
  const int64_t in = pool.h * pool.w * pool.c * element;
  const int64_t out = rows * pool.out_w() * pool.c * element;
  team.parallel_for(images * rows, kPooledRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += rows - at % rows) {
      const int64_t image = at / rows;
      PoolForward p = pool;
      p.x = static_cast<const char*>(pool.x) + image * in;
      p.x_first = 0;
      p.y = static_cast<char*>(y) + image * out;
      p.row0 = at % rows;
      p.row1 = std::min(rows, p.row0 + end - at);
      kernel(p);
    }
  });
}

void run_zero_pad(ThreadTeam& team, DType dtype, int64_t images, const ZeroPad& pad, const void* x,
                  void* y) {
  const int64_t element = bytes_of(dtype), rows = pad.out_h(), cols = pad.out_w();
  const int64_t from = pad.c * element, zeros = pad.zeros * element, to = pad.out_c() * element;
  team.parallel_for(images * rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / rows, line = row % rows * pad.stride_h;
      const char* pixel = static_cast<const char*>(x) + (image * pad.h + line) * pad.w * from;
      char* at = static_cast<char*>(y) + row * cols * to;
      for (int64_t i = 0; i < cols; ++i, pixel += pad.stride_w * from, at += to) {
        std::memset(at, 0, zeros);
        std::memcpy(at + zeros, pixel, from);
        std::memset(at + zeros + from, 0, zeros);
      }
    }
  });
}

void run_global_avg_pool(ThreadTeam& team, DType dtype, int64_t images, const MeanForward& f) {
  const Kernels& k = kernels().of[dtype];
  const int64_t parts = ceil_div(f.c, kAveragedChannels);
  team.parallel_for(images * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i % parts * kAveragedChannels;
      k.global_avg_pool(f, i / parts, c0, std::min(c0 + kAveragedChannels, f.c));
    }
  });
}

void run_linear(ThreadTeam& team, DType dtype, int64_t images, const LinearForward& f) {
  const Kernels& k = kernels().of[dtype];
  const int64_t rows = ceil_div(f.k, kLinearRowsAtOnce);
  const int64_t most = std::max(kLinearBytes / (f.c * bytes_of(dtype) + 1), kLinearRowsAtOnce);
  const int64_t blocks = ceil_div(images, most);
  team.parallel_for(blocks * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += rows - at % rows) {
      const int64_t block = at / rows, row0 = at % rows, row1 = std::min(rows, row0 + end - at);
      k.linear(f, row0 * kLinearRowsAtOnce, std::min(row1 * kLinearRowsAtOnce, f.k),
               images * block / blocks, images * (block + 1) / blocks);
    }
  });
}

void run_add_relu(ThreadTeam& team, DType dtype, int64_t numel, const AddForward& f) {
  const Kernels& k = kernels().of[dtype];
  const int64_t parts = ceil_div(numel, kAddedElements);
  team.parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    k.add_relu(f, begin * kAddedElements, std::min(end * kAddedElements, numel));
  });
}

}  // namespace fr
