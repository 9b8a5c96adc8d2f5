// What a block's microkernels prefetch into the L2 cache for the block that the thread most likely
// computes next: the one after it along the pixels. Its bytes in each map are contiguous.
//
// A tile's pixels are as many streams of addresses, and a hardware prefetcher follows few of them.
// On a server with a slow L3 cache (27 GB/s for one core, Xeon of family 6, model 207) 1x1
// convolutions of 64 to 128 channels took 1.2 to 1.6 times as long without this.
#pragma once

#include "table.h"
#include "vec.h"

namespace fr {
namespace FR_ISA {

class NextBlock {
 public:
  NextBlock() = default;

  // panels: of the whole convolution. A block of fewer shares its pixels with the next one, which
  // are near already.
  template <class T>
  static NextBlock of(const ConvForward& f, const ConvBlock& b, int64_t panels) {
    NextBlock next;
    if (b.panel1 - b.panel0 < panels) return next;
    const ConvShape& s = f.shape;
    const int64_t element = sizeof(T), input_row = s.w * s.c * element, result = s.k * element;
    const bool in_row = b.n1 - b.n0 == 1 && b.row1 - b.row0 == 1;  // the next one may be, too
    int64_t input, input_bytes, pixel, pixels;
    if (in_row) {
      input = (b.n0 * s.h + b.row0 * s.stride_h) * input_row + b.col1 * s.stride_w * s.c * element;
      input_bytes = (b.col1 - b.col0) * s.stride_w * s.c * element;
      pixel = (b.n0 * s.out_h() + b.row0) * s.out_w() + b.col1;
      pixels = b.col1 - b.col0;
    } else {
      // The rows that the next block has in common with this one are near already.
      const int64_t first = b.row1 * s.stride_h - s.pad_h + (s.kh - 1) * s.dilation_h;
      input = ((b.n1 - 1) * s.h + first) * input_row;
      input_bytes = ((b.n1 - b.n0 - 1) * s.h + (b.row1 - b.row0) * s.stride_h) * input_row;
      pixel = ((b.n1 - 1) * s.out_h() + b.row1) * s.out_w();
      pixels = (b.n1 - b.n0) * (b.row1 - b.row0) * s.out_w();
    }
    next.add(f.x, input, input_bytes, s.n * s.h * input_row);
    // The result and the residual only where both blocks fit the L2 cache.
    const int64_t results = f.residual ? 2 : 1;
    if (2 * (input_bytes + results * pixels * result) > kL2Bytes || f.y_first > 0) return next;
    const int64_t end = s.n * s.out_h() * s.out_w() * result;
    if (f.residual) next.add(f.residual, pixel * result, pixels * result, end);
    next.add(f.y, pixel * result, pixels * result, end);
    return next;
  }

  // The bytes that each of `steps` steps advances by: at most a line, so that none is left out.
  int64_t step(int64_t steps) const {
    int64_t bytes = 0;
    for (const Part& part : parts_) bytes += part.bytes;
    return min_of(ceil_div(bytes, max_of(steps, 1)), kLineBytes);
  }

  // Where the next `bytes` of a map begin. The end of a map, and the end of all, count as enough.
  const char* take(int64_t bytes) {
    while (at_ + 1 < count_ && taken_ >= parts_[at_].bytes) {
      ++at_;
      taken_ = 0;
    }
    const char* const from = parts_[at_].begin + min_of(taken_, parts_[at_].bytes);
    taken_ += bytes;
    return from;
  }

 private:
  static constexpr int64_t kL2Bytes = 1024 * 1024;  // of current server cores, at least

  struct Part {
    const char* begin;
    int64_t bytes;
  };
  Part parts_[3] = {};
  int count_ = 0, at_ = 0;
  int64_t taken_ = 0;

  void add(const void* map, int64_t begin, int64_t bytes, int64_t end) {
    begin = min_of(begin, end);
    parts_[count_++] = {static_cast<const char*>(map) + begin, min_of(bytes, end - begin)};
  }
};

}  // namespace FR_ISA
}  // namespace fr
