// Brings a stage of A (pixels as the convolution sees them: im2col, never stored) and of B
// (filters) into shared memory.
//
// A stage is 64 bytes of depth. A thread brings one of the four 16-byte chunks, the same in each of
// its rows, so where its chunk lies in the filter (tap and channel) is followed once for all rows.
// Chunks of 16 bytes want channel counts that are multiples of the pack; with others every element
// goes by itself: as correct, and slower.
#pragma once

#include "arithmetic.cuh"
#include "conv_params.cuh"

namespace fr {

// A place in the depth of a sum: the tap (ky, kx) and the channel c.
struct FilterPlace {
  int ky, kx, c;

  FR_DEVICE FilterPlace(int k, int kw, int channels) {
    const int tap = k / channels;
    c = k - tap * channels;
    ky = tap / kw;
    kx = tap - ky * kw;
  }

  FR_DEVICE void advance(int by, int kw, int channels) {
    c += by;
    while (c >= channels) {
      c -= channels;
      if (++kx == kw) {
        kx = 0;
        ++ky;
      }
    }
  }
};

template <class T, int kRows, int kThreads, bool kVector, bool kSecond>
class ImageSource {
  static constexpr int kEach = kRows * kChunks / kThreads;  // chunks that a thread brings
  static constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(T));
  static_assert(kRows * kChunks % kThreads == 0);
  static_assert(kVector || !kSecond);

 public:
  FR_DEVICE ImageSource(const ConvParams& p, int first_row, int channel0, int k0, int thread)
      : p_(p),
        k_(k0 + thread % kChunks * kPack<T>),
        place_(k_, p.image.kw, p.group_c),
        row_(thread / kChunks),
        chunk_(thread % kChunks) {
    const ConvImage& m = p.image;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first_row + row_ + i * (kThreads / kChunks);
      const int image = row / (p.out_h * p.out_w), pixel = row % (p.out_h * p.out_w);
      const int oy = pixel / p.out_w, ox = pixel % p.out_w;
      y_[i] = oy * m.stride_h - m.pad_h;
      x_[i] = ox * m.stride_w - m.pad_w;
      const int64_t at = static_cast<int64_t>(image) * m.h * m.w * m.c +
                         (static_cast<int64_t>(y_[i]) * m.w + x_[i]) * m.c + channel0;
      from_[i] = static_cast<const T*>(m.x) + at;
      if (row >= p.rows) y_[i] = kNowhere;
      if (kSecond) {
        const ConvImage& s = p.second;
        from2_[i] = static_cast<const T*>(s.x) +
                    (static_cast<int64_t>(image) * s.h + oy * s.stride_h) * s.w * s.c +
                    static_cast<int64_t>(ox) * s.stride_w * s.c;
      }
    }
  }

  // Brings the next stage.
  FR_DEVICE void bring(unsigned char* stage) {
    if (kVector) {
      bring_packs(stage);
    } else {
      bring_elements(stage);
    }
    k_ += kStep;
    place_.advance(kStep, p_.image.kw, p_.group_c);
  }

 private:
  static constexpr int kNowhere = -(1 << 30);  // outside of any map, at any tap

  FR_DEVICE bool inside(int i, const FilterPlace& at) const {
    const int y = y_[i] + at.ky * p_.image.dilation_h, x = x_[i] + at.kx * p_.image.dilation_w;
    return static_cast<unsigned>(y) < static_cast<unsigned>(p_.image.h) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(p_.image.w);
  }

  FR_DEVICE int tap_offset(const FilterPlace& at) const {
    return (at.ky * p_.image.dilation_h * p_.image.w + at.kx * p_.image.dilation_w) * p_.image.c +
           at.c;
  }

  FR_DEVICE void bring_packs(unsigned char* stage) {
    const int depth1 = p_.depth - (kSecond ? p_.second.c : 0);
    const int offset = tap_offset(place_);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      bool valid = k_ < depth1 && inside(i, place_);
      const T* from = from_[i] + offset;
      if (kSecond && k_ >= depth1) {
        valid = k_ < p_.depth && y_[i] != kNowhere;
        from = from2_[i] + (k_ - depth1);
      }
      // Without `valid` nothing is read, but the address should still be one.
      cp_async_16(stage + stage_offset(row_ + i * (kThreads / kChunks), chunk_),
                  valid ? from : static_cast<const T*>(p_.image.x), valid);
    }
  }

  FR_DEVICE void bring_elements(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      Pack<T> pack;
      FilterPlace at = place_;
      for (int e = 0; e < kPack<T>; ++e) {
        if (k_ + e < p_.depth && inside(i, at)) pack.values[e] = from_[i][tap_offset(at)];
        at.advance(1, p_.image.kw, p_.group_c);
      }
      const int row = row_ + i * (kThreads / kChunks);
      *reinterpret_cast<uint4*>(stage + stage_offset(row, chunk_)) = pack.bits;
    }
  }

  const ConvParams& p_;
  int k_;
  FilterPlace place_;
  int row_, chunk_;
  const T* from_[kEach];  // of the window's first tap, which may lie outside of the map
  const T* from2_[kSecond ? kEach : 1];
  int y_[kEach], x_[kEach];
};

// Filters, each `depth` elements long, one after another.
template <class T, int kRows, int kThreads, bool kVector>
class FilterSource {
  static constexpr int kEach = kRows * kChunks / kThreads;
  static constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(T));
  static_assert(kRows * kChunks % kThreads == 0);

 public:
  // `filters` of them are there from `first` on.
  FR_DEVICE FilterSource(const T* first, int filters, int depth, int k0, int thread)
      : from_(first),
        filters_(filters),
        depth_(depth),
        k_(k0 + thread % kChunks * kPack<T>),
        row_(thread / kChunks),
        chunk_(thread % kChunks) {}

  FR_DEVICE void bring(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = row_ + i * (kThreads / kChunks);
      const T* from = from_ + static_cast<int64_t>(row) * depth_ + k_;
      unsigned char* to = stage + stage_offset(row, chunk_);
      if (kVector) {
        const bool valid = row < filters_ && k_ < depth_;
        cp_async_16(to, valid ? from : from_, valid);
      } else {
        Pack<T> pack;
        for (int e = 0; e < kPack<T>; ++e) {
          if (row < filters_ && k_ + e < depth_) pack.values[e] = from[e];
        }
        *reinterpret_cast<uint4*>(to) = pack.bits;
      }
    }
    k_ += kStep;
  }

 private:
  const T* from_;
  int filters_, depth_, k_, row_, chunk_;
};

}  // namespace fr
