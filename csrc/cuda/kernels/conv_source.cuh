// Loads stages of A (pixels in im2col order, which is never stored) and of B (filters) into shared
// memory.
//
// A stage is 64 bytes of depth. A thread loads one of the four 16-byte chunks, the same one in each
// of its rows, so the chunk's position in the filter (tap and channel) is tracked once for all
// rows. Chunks of 16 bytes require channel counts that are multiples of the pack; otherwise
// elements are loaded one by one, which is slower.
#pragma once

#include "arithmetic.cuh"
#include "conv_params.cuh"

namespace fr {

// A position in the depth of a sum: the tap (ky, kx) and the channel c.
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

// Where the thread's first chunk is in the first stage. B's chunk is as far after A's as B's rows
// are after A's.
FR_DEVICE SharedAddress first_chunk(unsigned char* ring, int thread) {
  return opaque(shared_address(ring) + stage_offset(thread / kChunks, thread % kChunks));
}

template <class T, int kRows, int kThreads, bool kVector, bool kSecond>
class ImageSource {
  static constexpr int kEach = kRows * kChunks / kThreads;  // chunks per thread
  static constexpr int kApart = kThreads / kChunks;         // rows between them
  static constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(T));
  static_assert(kRows * kChunks % kThreads == 0 && kApart % 8 == 0);
  static_assert(kVector || !kSecond);

 public:
  // `to` is the thread's first chunk of A in the first stage.
  FR_DEVICE ImageSource(const ConvParams& p, int first_row, int channel0, int k0, SharedAddress to,
                        int thread)
      : p_(p),
        k_(k0 + thread % kChunks * kPack<T>),
        place_(k_, p.image.kw, p.group_c),
        to_(to),
        first_row_(first_row) {
    const ConvImage& m = p.image;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first_row + thread / kChunks + i * kApart;
      const int image = row / (p.out_h * p.out_w), pixel = row % (p.out_h * p.out_w);
      const int oy = pixel / p.out_w, ox = pixel % p.out_w;
      const int y = oy * m.stride_h - m.pad_h, x = ox * m.stride_w - m.pad_w;
      from_[i] = static_cast<const T*>(m.x) + static_cast<int64_t>(image) * m.h * m.w * m.c +
                 (static_cast<int64_t>(y) * m.w + x) * m.c + channel0;
      const bool there = row < p.rows;
      if (kVector) {
        taps_[i] = there ? taps_inside(y, x) : 0;
      } else {
        y_[i] = there ? y : kNowhere;
        x_[i] = x;
      }
    }
  }

  // Loads what comes next into the stage at this distance from the first one.
  FR_DEVICE void bring(int stage) {
    if (kVector) {
      bring_packs(stage);
    } else {
      bring_elements(stage);
    }
    k_ += kStep;
    place_.advance(kStep, p_.image.kw, p_.group_c);
  }

 private:
  static constexpr int kNowhere = -(1 << 30);  // a row that is outside of the map for every tap

  FR_DEVICE bool inside(int y, int x) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(p_.image.h) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(p_.image.w);
  }

  // One bit per tap of the window at (y, x): whether it is inside the map. Computed once, so that a
  // step needs one instruction per row.
  FR_DEVICE uint64_t taps_inside(int y, int x) const {
    uint64_t taps = 0, bit = 1;
    for (int ky = 0; ky < p_.image.kh; ++ky) {
      for (int kx = 0; kx < p_.image.kw; ++kx, bit <<= 1) {
        if (inside(y + ky * p_.image.dilation_h, x + kx * p_.image.dilation_w)) taps |= bit;
      }
    }
    return taps;
  }

  // From the window's first tap. With padding that may lie far outside of the image, so that the
  // offset of a tap inside exceeds 32 bits even where an image's elements do not.
  FR_DEVICE int64_t tap_offset(const FilterPlace& at) const {
    const int64_t row = static_cast<int64_t>(at.ky * p_.image.dilation_h) * p_.image.w;
    return (row + at.kx * p_.image.dilation_w) * p_.image.c + at.c;
  }

  // From here on the thread reads the second map, whose one tap is inside for each pixel of y. Its
  // pixels are computed here: the surrounding loop has no registers for them.
  FR_DEVICE void enter_second() {
    const ConvImage& s = p_.second;
    const int first = first_row_ + opaque(static_cast<int>(threadIdx.x)) / kChunks;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first + i * kApart;
      const int image = row / (p_.out_h * p_.out_w), pixel = row % (p_.out_h * p_.out_w);
      const int oy = pixel / p_.out_w, ox = pixel % p_.out_w;
      from_[i] = static_cast<const T*>(s.x) +
                 (static_cast<int64_t>(image) * s.h + oy * s.stride_h) * s.w * s.c +
                 static_cast<int64_t>(ox) * s.stride_w * s.c;
      taps_[i] = row < p_.rows ? 1 : 0;
    }
    in_second_ = true;
  }

  FR_DEVICE void bring_packs(int stage) {
    const int depth1 = p_.depth - (kSecond ? p_.second.c : 0);
    int64_t offset;
    uint64_t tap;  // beyond the depth no tap is inside
    if (kSecond && k_ >= depth1) {
      if (!in_second_) enter_second();
      offset = k_ - depth1;
      tap = k_ < p_.depth ? 1 : 0;
    } else {
      offset = tap_offset(place_);
      tap = k_ < depth1 ? uint64_t{1} << (place_.ky * p_.image.kw + place_.kx) : 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      cp_async_16(to_ + stage + i * kApart * kStageRowBytes, from_[i] + offset,
                  (taps_[i] & tap) != 0);
    }
  }

  FR_DEVICE void bring_elements(int stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      Pack<T> pack;
      FilterPlace at = place_;
      for (int e = 0; e < kPack<T>; ++e) {
        const int y = y_[i] + at.ky * p_.image.dilation_h;
        const int x = x_[i] + at.kx * p_.image.dilation_w;
        if (k_ + e < p_.depth && inside(y, x)) pack.values[e] = from_[i][tap_offset(at)];
        at.advance(1, p_.image.kw, p_.group_c);
      }
      store_shared_16(to_ + stage + i * kApart * kStageRowBytes, pack.bits);
    }
  }

  const ConvParams& p_;
  int k_;
  FilterPlace place_;
  SharedAddress to_;
  const T* from_[kEach];  // the first tap of the window, which may be outside of the map
  uint64_t taps_[kVector ? kEach : 1];
  int y_[kVector ? 1 : kEach], x_[kVector ? 1 : kEach];
  int first_row_;
  bool in_second_ = false;
};

// Loads filters of `depth` elements, which are contiguous.
template <class T, int kRows, int kThreads, bool kVector>
class FilterSource {
  static constexpr int kEach = kRows * kChunks / kThreads;
  static constexpr int kApart = kThreads / kChunks;
  static constexpr int kStep = kStageRowBytes / static_cast<int>(sizeof(T));
  static_assert(kRows * kChunks % kThreads == 0 && kApart % 8 == 0);

 public:
  // `filters` is the number of filters from `first` on; `to` is the thread's first chunk of B in
  // the first stage.
  FR_DEVICE FilterSource(const T* first, int filters, int depth, int k0, SharedAddress to,
                         int thread)
      : from_(first + static_cast<int64_t>(thread / kChunks) * depth),
        filters_(filters - thread / kChunks),
        depth_(depth),
        k_(k0 + thread % kChunks * kPack<T>),
        to_(to) {}

  FR_DEVICE void bring(int stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const T* from = from_ + static_cast<int64_t>(i * kApart) * depth_ + k_;
      const SharedAddress to = to_ + stage + i * kApart * kStageRowBytes;
      const bool valid = i * kApart < filters_;
      if (kVector) {
        cp_async_16(to, from, valid && k_ < depth_);
      } else {
        Pack<T> pack;
        for (int e = 0; e < kPack<T>; ++e) {
          if (valid && k_ + e < depth_) pack.values[e] = from[e];
        }
        store_shared_16(to, pack.bits);
      }
    }
    k_ += kStep;
  }

 private:
  const T* from_;  // the thread's first filter
  int filters_;    // number of filters from that one on
  int depth_, k_;
  SharedAddress to_;
};

}  // namespace fr
