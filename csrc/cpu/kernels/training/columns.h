// Walks over channels-last rows: whole vectors of channels, followed by the remainder that is less
// than a vector.
#pragma once

#include "../vec.h"

namespace fr {
namespace FR_ISA {

// A vector of channels, all of it or the first `count`. The rest of a loaded one is zeros.
struct Whole {
  template <class T>
  FR_INLINE Vec<Acc<T>> get(const T* p) const {
    return load(p);
  }
  template <class T>
  FR_INLINE void put(Vec<Acc<T>> v, T* p) const {
    store(v, p);
  }
};
struct Part {
  int64_t count;

  template <class T>
  FR_INLINE Vec<Acc<T>> get(const T* p) const {
    T all[kLanes<Acc<T>>] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = p[i];
    return load(all);
  }
  template <class T>
  FR_INLINE void put(Vec<Acc<T>> v, T* p) const {
    T all[kLanes<Acc<T>>];
    store(v, all);
    for (int64_t i = 0; i < count; ++i) p[i] = all[i];
  }
};

// Calls column(lanes, c) for all channels.
template <class A, class Column>
FR_INLINE void for_columns(int64_t channels, Column column) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) column(Whole{}, c);
  if (c < channels) column(Part{channels - c}, c);
}

// Calls column(lanes, rows, first, c) for the elements first, first + channels, .. of some rows,
// and all channels: what is per channel is read once for four rows, and maps are still walked in
// order.
template <class A, class Column>
FR_INLINE void for_rows(int64_t begin, int64_t end, int64_t channels, Column column) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    for_columns<A>(channels, [&](auto lanes, int64_t c) {
      column(lanes, Constant<4>{}, row * channels + c, c);
    });
  }
  for (; row < end; ++row) {
    for_columns<A>(channels, [&](auto lanes, int64_t c) {
      column(lanes, Constant<1>{}, row * channels + c, c);
    });
  }
}

}  // namespace FR_ISA
}  // namespace fr
