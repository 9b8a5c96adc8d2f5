// A map that a training kernel writes, in vectors of channels.
//
// An ordinary store reads the line that it writes to and evicts another one from the caches. If a
// map is too large to be in the caches when it is read, its lines are stored past them
// (non-temporal stores): a 1x1 convolution of 64 to 256 channels at 56x56, batch 16, takes 8.5 ms
// in place of 10.0 (measured, Zen 4). Only whole lines can be: vectors of 64 bytes, of elements
// that are not narrowed. for_blocks waits for them (blocks.h).
#pragma once

#include "../vec.h"

#if FR_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

namespace fr {
namespace FR_ISA {

// More than half of a common L3 cache, which the other operands of a pass need too.
constexpr int64_t kStreamedBytes = 20 * 1024 * 1024;

template <class T>
class WrittenMap {
  using A = Acc<T>;
  static constexpr bool kLines =
      FR_VECTOR_BYTES == kLineBytes && sizeof(T) == sizeof(A);  // a vector is one

 public:
  FR_INLINE WrittenMap(void* map, int64_t pixels, int64_t channels)
      : map_(static_cast<T*>(map)),
        streamed_(kLines && pixels * channels * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes &&
                  channels % kLanes<A> == 0 && reinterpret_cast<uintptr_t>(map) % kLineBytes == 0) {
  }

  FR_INLINE T* at(int64_t i) const { return map_ + i; }

  // Prefetches the line of element i, unless stores bypass the caches.
  FR_INLINE void prefetch(int64_t i) const {
    if (!streamed_) __builtin_prefetch(map_ + i, 1);
  }

  // A vector whose first element is i. Subnormal numbers may become zero where that is faster.
  FR_INLINE void put(Vec<A> v, int64_t i) const {
    if (!stream(v, i)) store_flushing(v, map_ + i);
  }
  // The part of a vector that `lanes` is (columns.h).
  template <class Lanes>
  FR_INLINE void put(Lanes lanes, Vec<A> v, int64_t i) const {
    if (!stream(v, i)) lanes.put(v, map_ + i);
  }

  // Zeros from element i on.
  FR_INLINE void put_zeros(int64_t i, int64_t count) const {
    __builtin_memset(map_ + i, 0, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  // Returns whether it has stored the vector.
  FR_INLINE bool stream(Vec<A> v, int64_t i) const {
#if FR_VECTOR_BYTES == 64
    if constexpr (kLines) {
      if (streamed_) _mm512_stream_si512(reinterpret_cast<__m512i*>(map_ + i), (__m512i)v);
      return streamed_;
    }
#endif
    return false;
  }

  T* map_;
  bool streamed_;
};

}  // namespace FR_ISA
}  // namespace fr
