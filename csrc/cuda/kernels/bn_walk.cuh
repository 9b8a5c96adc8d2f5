// How a thread traverses a map: it stays with the same channels, whose numbers stay in registers,
// and visits items a block's height apart.
//
// The layout matters only in offset() and in the loads of per-channel numbers. It is a run-time
// value, and the branch is uniform, which halves the number of instances.
#pragma once

#include <type_traits>

#include "../element.cuh"
#include "bn_params.cuh"

namespace fr {

// What one thread loads at a time, in its storage type, which takes half as many registers as
// float32 while loads are pending. kVector is kPack<T>, or 1 where channels or pixels do not fill
// packs.
template <class T, int kVector>
class BnItem {
 public:
  FR_DEVICE void load(const T* from) {
    if constexpr (kVector == 1) {
      raw_ = *from;
    } else {
      raw_.bits = *reinterpret_cast<const uint4*>(from);
    }
  }
  FR_DEVICE void store(T* to) const {
    if constexpr (kVector == 1) {
      *to = raw_;
    } else {
      *reinterpret_cast<uint4*>(to) = raw_.bits;
    }
  }
  FR_DEVICE float get(int e) const {
    if constexpr (kVector == 1) {
      return to_float(raw_);
    } else {
      return to_float(raw_.values[e]);
    }
  }
  FR_DEVICE void set(int e, float v) {
    if constexpr (kVector == 1) {
      raw_ = from_float<T>(v);
    } else {
      raw_.values[e] = from_float<T>(v);
    }
  }

 private:
  std::conditional_t<kVector == 1, T, Pack<T>> raw_;
};

template <int kVector>
class BnWalk {
 public:
  FR_DEVICE explicit BnWalk(const BnMap& map) : map_(map) {
    const int lane = threadIdx.x & (map.lanes - 1);
    const int first = blockIdx.x * map.lanes + lane;
    channel_ = channels_last() ? first * kVector : first;
    row_ = threadIdx.x / map.lanes;
    rows_ = kBnThreads / map.lanes;
    begin_ = blockIdx.y * map.slab_items;
    end_ = min(begin_ + map.slab_items, map.items);
  }

  FR_DEVICE bool channels_last() const { return map_.items_per_image == 0; }
  // A block may extend beyond the last channel.
  FR_DEVICE bool active() const { return channel_ < map_.channels; }
  FR_DEVICE int channel() const { return channel_; }
  FR_DEVICE int row() const { return row_; }
  // Number of items of this thread; the i-th is at forwards(i), the i-th from the end at
  // backwards(i).
  FR_DEVICE int count() const {
    const int left = end_ - begin_ - row_;
    return left > 0 ? (left + rows_ - 1) / rows_ : 0;
  }
  FR_DEVICE int64_t forwards(int i) const { return offset(begin_ + row_ + i * rows_); }
  FR_DEVICE int64_t backwards(int i) const { return offset(end_ - 1 - row_ - i * rows_); }

  // Offset of an item.
  FR_DEVICE int64_t offset(int item) const {
    if (channels_last()) return static_cast<int64_t>(item) * map_.channels + channel_;
    const int image = item / map_.items_per_image;
    const int within = item - image * map_.items_per_image;
    return (static_cast<int64_t>(image) * map_.channels + channel_) * map_.plane + within * kVector;
  }

  // The per-channel number of each value of an item; `otherwise` if `numbers` is null.
  FR_DEVICE void per_channel(float (&v)[kVector], const float* numbers, float otherwise) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      v[e] = numbers ? numbers[channels_last() ? channel_ + e : channel_] : otherwise;
    }
  }

 private:
  const BnMap& map_;
  int channel_, row_, rows_, begin_, end_;
};

}  // namespace fr
