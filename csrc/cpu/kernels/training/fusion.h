// What is fused before and after the training convolutions, for maps of storage type T.
//
// A prologue makes an operand while it is loaded, so that it is never stored: batch norm and ReLU
// of the previous convolution, or the affine gradient of batch norm. An epilogue sees the result in
// registers: statistics of what is stored, or the ReLU mask and the two sums of batch norm's
// backward.
//
// A kernel calls `channel(c)` once for the vector of channels that begins at c, and uses the result
// for any number of pixels, each given by the element i at which its vector begins. All vectors are
// whole: kernels require numbers of channels that are multiples of the vector.
#pragma once

#include "../vec.h"
#include "table.h"
#include "written_map.h"

namespace fr {
namespace FR_ISA {

// --- Arithmetic. ---------------------------------------------------------------------------------

// relu(x * scale + shift), by which the forward normalises; NaN passes.
template <class V>
FR_INLINE V bn_relu(V x, V scale, V shift) {
  const V v = x * scale + shift;
  return V{} > v ? V{} : v;
}

// v where that ReLU's argument was positive, by the same multiply-add; NaN passes.
template <class V>
FR_INLINE V bn_relu_mask(V v, V x, V scale, V shift) {
  return x * scale + shift <= 0 ? V{} : v;
}

template <class V>
FR_INLINE V bn_gradient_of(V g, V z, V a, V b, V c) {
  return a * g + (b * z + c);
}

// --- Prologues. ----------------------------------------------------------------------------------

// The addresses that a prologue reads from an element on, for a product that prefetches them.
struct Ahead {
  const char *first, *second;
};
template <class T>
FR_INLINE Ahead ahead_of(const T* first, const T* second) {
  return {reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(second)};
}

template <class T>
struct Plain {
  using A = Acc<T>;
  const T* x;
  struct Channel {};
  FR_INLINE Channel channel(int64_t) const { return {}; }
  FR_INLINE Vec<A> get(int64_t i, const Channel&) const { return load(x + i); }
  // Prefetches the cache line of element i.
  FR_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
  FR_INLINE Ahead ahead(int64_t i) const { return ahead_of(x + i, x + i); }
};

template <class T>
struct BnRelu {
  using A = Acc<T>;
  const T* x;
  const A *scale, *shift;
  struct Channel {
    Vec<A> scale, shift;
  };
  FR_INLINE Channel channel(int64_t c) const { return {load(scale + c), load(shift + c)}; }
  FR_INLINE Vec<A> get(int64_t i, const Channel& k) const {
    return bn_relu(load(x + i), k.scale, k.shift);
  }
  FR_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i); }
  FR_INLINE Ahead ahead(int64_t i) const { return ahead_of(x + i, x + i); }
};

// dz = a * g + b * z + c.
template <class T>
struct BnGrad {
  using A = Acc<T>;
  const T *g, *z;
  const A *a, *b, *c;
  struct Channel {
    Vec<A> a, b, c;
  };
  FR_INLINE Channel channel(int64_t k) const { return {load(a + k), load(b + k), load(c + k)}; }
  FR_INLINE Vec<A> get(int64_t i, const Channel& k) const {
    return bn_gradient_of(load(g + i), load(z + i), k.a, k.b, k.c);
  }
  FR_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(g + i);
    __builtin_prefetch(z + i);
  }
  FR_INLINE Ahead ahead(int64_t i) const { return ahead_of(g + i, z + i); }
};

// dz = a * g, of a batch norm that does not depend on the batch.
template <class T>
struct Scaled {
  using A = Acc<T>;
  const T* g;
  const A* a;
  struct Channel {
    Vec<A> a;
  };
  FR_INLINE Channel channel(int64_t k) const { return {load(a + k)}; }
  FR_INLINE Vec<A> get(int64_t i, const Channel& k) const { return k.a * load(g + i); }
  FR_INLINE void prefetch(int64_t i) const { __builtin_prefetch(g + i); }
  FR_INLINE Ahead ahead(int64_t i) const { return ahead_of(g + i, g + i); }
};

// Calls run(prologue) with that of the forward's input.
template <class T, class Args, class Run>
FR_INLINE void with_input(const Args& f, Run run) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(f.x);
  if (f.x_scale) {
    run(BnRelu<T>{x, static_cast<const A*>(f.x_scale), static_cast<const A*>(f.x_shift)});
  } else {
    run(Plain<T>{x});
  }
}

// Calls run(prologue) with that of dz.
template <class T, class Run>
FR_INLINE void with_gradient(const TrainingBackward& f, Run run) {
  using A = Acc<T>;
  const T *g = static_cast<const T*>(f.g), *z = static_cast<const T*>(f.z);
  const A* a = static_cast<const A*>(f.a);
  if (z) {
    run(BnGrad<T>{g, z, a, static_cast<const A*>(f.b), static_cast<const A*>(f.c)});
  } else {
    run(Scaled<T>{g, a});
  }
}

// --- Sums over a block. --------------------------------------------------------------------------

// Channels [begin, end) of a result, which one thread makes.
struct ChannelRange {
  int64_t begin, end;
};

// kRows sums per channel of `made`. Added in A over kSumRows pixels at most, since `fold` is called
// that often, and in float64 beyond that.
template <class A, int kRows>
struct BlockSums {
  A* near;        // [kRows][channels], in scratch
  double* total;  // [kRows][channels], the block's place in the result
  int64_t channels;
  ChannelRange made{0, channels};

  static int64_t scratch_bytes(int64_t channels) {
    return kRows * channels * static_cast<int64_t>(sizeof(A));
  }

  // Called once for a block of pixels, from many kernels: compiled once.
  __attribute__((noinline)) void clear() const {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t i = row * channels + made.begin; i < row * channels + made.end; ++i) {
        near[i] = 0;
        total[i] = 0;
      }
    }
  }

  // Row 0 is set instead of added to where `pivot`.
  __attribute__((noinline)) void fold(bool pivot) const {
    for (int64_t row = 0; row < kRows; ++row) {
      const bool set = pivot && row == 0;
      for (int64_t i = row * channels + made.begin; i < row * channels + made.end; ++i) {
        total[i] = set ? near[i] : total[i] + near[i];
        if (!set) near[i] = 0;
      }
    }
  }
};

// --- Epilogues. ----------------------------------------------------------------------------------
//
// begin()                    before a block
// channel(c)                 before a vector of channels
// pivot(v, channel)          once a block and vector of channels, with any value near its mean
// put(v, i, channel)         for a pixel
// put_zeros(i, count)        for all channels of a pixel, instead of channel, put and done
// done(channel, c)           after the last use of `channel`
// fold()                     after kSumRows pixels at most, and at the end of a block
//
// `v` is what is to be stored; `i` the element of the result where its vector begins.

template <class T>
struct Store {
  using A = Acc<T>;
  WrittenMap<T> y;
  struct Channel {};
  FR_INLINE void begin() const {}
  FR_INLINE Channel channel(int64_t) const { return {}; }
  FR_INLINE void pivot(Vec<A>, Channel&) const {}
  FR_INLINE void prefetch(int64_t i) const { y.prefetch(i); }
  FR_INLINE void put(Vec<A> v, int64_t i, Channel&) const { y.put(v, i); }
  FR_INLINE void put_zeros(int64_t i, int64_t count) const { y.put_zeros(i, count); }
  FR_INLINE void done(const Channel&, int64_t) const {}
  FR_INLINE void fold() const {}
};

// Sums of v - pivot and of its square: with a pivot near the mean the second does not cancel.
template <class T>
struct StoreStatistics {
  using A = Acc<T>;
  WrittenMap<T> y;
  BlockSums<A, kStatisticsRows> sums;
  struct Channel {
    Vec<A> pivot, sum, squares;
  };
  FR_INLINE void begin() const { sums.clear(); }
  FR_INLINE Channel channel(int64_t c) const {
    return {load(sums.near + kPivot * sums.channels + c), Vec<A>{}, Vec<A>{}};
  }
  FR_INLINE void pivot(Vec<A> v, Channel& k) const { k.pivot = v; }
  FR_INLINE void prefetch(int64_t i) const { y.prefetch(i); }
  FR_INLINE void put(Vec<A> v, int64_t i, Channel& k) const {
    y.put(v, i);
    const Vec<A> d = (sizeof(T) == sizeof(A) ? v : load(y.at(i))) - k.pivot;  // of what is stored
    k.sum += d;
    k.squares += d * d;
  }
  FR_INLINE void done(const Channel& k, int64_t c) const {
    A *sum = sums.near + kSumFromPivot * sums.channels + c,
      *squares = sums.near + kSquaresFromPivot * sums.channels + c;
    store(k.pivot, sums.near + kPivot * sums.channels + c);
    store(load(sum) + k.sum, sum);
    store(load(squares) + k.squares, squares);
  }
  FR_INLINE void fold() const { sums.fold(true); }
};

// The gradient through the ReLU of the previous convolution.
template <class T>
struct StoreMasked {
  using A = Acc<T>;
  WrittenMap<T> g;
  const T* x;
  const A *scale, *shift;
  struct Channel {
    Vec<A> scale, shift;
  };
  FR_INLINE void begin() const {}
  FR_INLINE Channel channel(int64_t c) const { return {load(scale + c), load(shift + c)}; }
  FR_INLINE void pivot(Vec<A>, Channel&) const {}
  FR_INLINE void prefetch(int64_t i) const {
    g.prefetch(i);
    __builtin_prefetch(x + i);
  }
  FR_INLINE void put(Vec<A> v, int64_t i, Channel& k) const {
    g.put(bn_relu_mask(v, load(x + i), k.scale, k.shift), i);
  }
  FR_INLINE void put_zeros(int64_t i, int64_t count) const { g.put_zeros(i, count); }
  FR_INLINE void done(const Channel&, int64_t) const {}
  FR_INLINE void fold() const {}
};

// The same, and the sums that its batch norm needs.
template <class T>
struct StoreMaskedSums {
  using A = Acc<T>;
  WrittenMap<T> g;
  const T* x;
  const A *scale, *shift, *mean;
  BlockSums<A, kGradientRows> sums;
  struct Channel {
    Vec<A> scale, shift, mean, sum, sum_xc;
  };
  FR_INLINE void begin() const { sums.clear(); }
  FR_INLINE Channel channel(int64_t c) const {
    return {load(scale + c), load(shift + c), load(mean + c), Vec<A>{}, Vec<A>{}};
  }
  FR_INLINE void pivot(Vec<A>, Channel&) const {}
  FR_INLINE void prefetch(int64_t i) const {
    g.prefetch(i);
    __builtin_prefetch(x + i);
  }
  FR_INLINE void put(Vec<A> v, int64_t i, Channel& k) const {
    const Vec<A> at = load(x + i);
    Vec<A> d = bn_relu_mask(v, at, k.scale, k.shift);
    g.put(d, i);
    if (sizeof(T) != sizeof(A)) d = load(g.at(i));  // of what is stored
    k.sum += d;
    k.sum_xc += d * (at - k.mean);
  }
  FR_INLINE void put_zeros(int64_t i, int64_t count) const { g.put_zeros(i, count); }
  FR_INLINE void done(const Channel& k, int64_t c) const {
    A *sum = sums.near + kSumG * sums.channels + c,
      *sum_xc = sums.near + kSumGXc * sums.channels + c;
    store(load(sum) + k.sum, sum);
    store(load(sum_xc) + k.sum_xc, sum_xc);
  }
  FR_INLINE void fold() const { sums.fold(false); }
};

// The shortcut's gradient is added: the gradient of a block's input.
template <class T>
struct StoreSum {
  using A = Acc<T>;
  WrittenMap<T> g;
  const T* add;
  struct Channel {};
  FR_INLINE void begin() const {}
  FR_INLINE Channel channel(int64_t) const { return {}; }
  FR_INLINE void pivot(Vec<A>, Channel&) const {}
  FR_INLINE void prefetch(int64_t i) const {
    g.prefetch(i);
    __builtin_prefetch(add + i);
  }
  FR_INLINE void put(Vec<A> v, int64_t i, Channel&) const { g.put(v + load(add + i), i); }
  FR_INLINE void put_zeros(int64_t i, int64_t count) const {
    Channel all;
    for (int64_t c = 0; c < count; c += kLanes<A>) put(Vec<A>{}, i + c, all);
  }
  FR_INLINE void done(const Channel&, int64_t) const {}
  FR_INLINE void fold() const {}
};

// Calls run(epilogue) with the forward's; `near` is room for BlockSums<Acc<T>, kStatisticsRows>.
template <class T, class Run>
FR_INLINE void with_result(const TrainingForward& f, int64_t block, void* near, ChannelRange made,
                           Run run) {
  const ConvShape& s = f.shape;
  const int64_t k = s.k;
  const WrittenMap<T> z(f.z, s.n * s.out_h() * s.out_w(), k);
  if (f.sums) {
    run(StoreStatistics<T>{
        z, {static_cast<Acc<T>*>(near), f.sums + block * kStatisticsRows * k, k, made}});
  } else {
    run(Store<T>{z});
  }
}
template <class T, class Run>
FR_INLINE void with_result(const TrainingForward& f, int64_t block, void* near, Run run) {
  with_result<T>(f, block, near, ChannelRange{0, f.shape.k}, run);
}

// The same with the data gradient's, where there is the ReLU of a previous convolution; `near` is
// room for BlockSums<Acc<T>, kGradientRows>.
template <class T, class Run>
FR_INLINE void with_masked_gradient(const TrainingBackward& f, int64_t block, void* near,
                                    ChannelRange made, Run run) {
  using A = Acc<T>;
  const ConvShape& s = f.shape;
  const int64_t c = s.c;
  const WrittenMap<T> g(f.g_x, s.n * s.h * s.w, c);
  const T* x = static_cast<const T*>(f.x);
  const A *scale = static_cast<const A*>(f.x_scale), *shift = static_cast<const A*>(f.x_shift);
  if (f.sums) {
    run(StoreMaskedSums<T>{g,
                           x,
                           scale,
                           shift,
                           static_cast<const A*>(f.x_mean),
                           {static_cast<A*>(near), f.sums + block * kGradientRows * c, c, made}});
  } else {
    run(StoreMasked<T>{g, x, scale, shift});
  }
}

// And where there is none.
template <class T, class Run>
FR_INLINE void with_whole_gradient(const TrainingBackward& f, Run run) {
  const ConvShape& s = f.shape;
  const WrittenMap<T> g(f.g_x, s.n * s.h * s.w, s.c);
  if (f.add) {
    run(StoreSum<T>{g, static_cast<const T*>(f.add)});
  } else {
    run(Store<T>{g});
  }
}

template <class T, class Run>
FR_INLINE void with_input_gradient(const TrainingBackward& f, int64_t block, void* near,
                                   ChannelRange made, Run run) {
  if (f.x_scale) {
    with_masked_gradient<T>(f, block, near, made, run);
  } else {
    with_whole_gradient<T>(f, run);
  }
}
template <class T, class Run>
FR_INLINE void with_input_gradient(const TrainingBackward& f, int64_t block, void* near, Run run) {
  with_input_gradient<T>(f, block, near, ChannelRange{0, f.shape.c}, run);
}

// Calls run(prologue, epilogue) with that of the input and that of its gradient. Only the pairs
// that occur are compiled: both have the ReLU, or neither has.
template <class T, class Run>
FR_INLINE void with_input_and_gradient(const TrainingBackward& f, int64_t block, void* near,
                                       Run run) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(f.x);
  if (f.x_scale) {
    const BnRelu<T> in{x, static_cast<const A*>(f.x_scale), static_cast<const A*>(f.x_shift)};
    with_masked_gradient<T>(f, block, near, ChannelRange{0, f.shape.c},
                            [&](const auto& e) { run(in, e); });
  } else {
    with_whole_gradient<T>(f, [&](const auto& e) { run(Plain<T>{x}, e); });
  }
}

}  // namespace FR_ISA
}  // namespace fr
