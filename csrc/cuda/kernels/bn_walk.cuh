// How a thread goes over a map: always the same channel or channels, so that their numbers stay in
// registers, and items a block's height apart.
//
// Which of the two layouts it is shows only in offset() and in how per-channel numbers are loaded;
// it is known at run time, and the branch is the same for all threads. That halves the number of
// instances.
#pragma once

#include <type_traits>

#include "../element.cuh"
#include "bn_params.cuh"

namespace fr {

// What one thread moves at a time, as it lies in memory: half as many registers as its values take
// while it is under way. kVector is kPack<T>, or 1 where channels or pixels do not fill packs.
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
  // A block may be wider than what is left of the channels.
  FR_DEVICE bool active() const { return channel_ < map_.channels; }
  FR_DEVICE int channel() const { return channel_; }
  FR_DEVICE int row() const { return row_; }
  // How many items are this thread's; the i-th begins at forwards(i), or from the end backwards(i).
  FR_DEVICE int count() const {
    const int left = end_ - begin_ - row_;
    return left > 0 ? (left + rows_ - 1) / rows_ : 0;
  }
  FR_DEVICE int64_t forwards(int i) const { return offset(begin_ + row_ + i * rows_); }
  FR_DEVICE int64_t backwards(int i) const { return offset(end_ - 1 - row_ - i * rows_); }

  // Where an item begins.
  FR_DEVICE int64_t offset(int item) const {
    if (channels_last()) return static_cast<int64_t>(item) * map_.channels + channel_;
    const int image = item / map_.items_per_image;
    const int within = item - image * map_.items_per_image;
    return (static_cast<int64_t>(image) * map_.channels + channel_) * map_.plane + within * kVector;
  }

  // The number that belongs to each value of an item; `otherwise` if there is none.
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
