// Vectors of the instruction set that this file is compiled for, by the compiler's own vector
// types, and the storage types with their conversions.
//
// FR_ISA names the set and FR_VECTOR_BYTES its registers. All code is in the namespace fr::FR_ISA
// and calls no inline function of the standard library: the linker keeps one copy of such a
// function, which might be one with instructions that another machine lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fr {
namespace FR_ISA {

// A number as an argument of a generic lambda.
template <int n>
struct Constant {
  static constexpr int value = n;
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Arithmetic type of a storage type.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
constexpr int kLanes = FR_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(FR_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;

// The index operand of a shuffle: integers of the width of the lanes, which is the type of a
// comparison of vectors.
template <class A>
using LaneIndex = decltype(Vec<A>{} < Vec<A>{});

constexpr int64_t kLineBytes = 64;  // of the caches

#define FR_INLINE inline __attribute__((always_inline))
// Conversions of float16: an instruction each or, without F16C, so many that they are called.
#ifdef __F16C__
#define FR_CONVERSION FR_INLINE
#else
#define FR_CONVERSION inline __attribute__((noinline))
#endif

FR_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FR_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FR_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
FR_INLINE Vec<A> broadcast(A v) {
  return v - Vec<A>{};  // x - 0 keeps every bit pattern that arithmetic can tell apart, -0 included
}

// Scalars.

FR_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}
FR_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, sizeof u);
  return u;
}

FR_INLINE float to_acc(float v) { return v; }
FR_INLINE double to_acc(double v) { return v; }
FR_INLINE float to_acc(BFloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
FR_CONVERSION float to_acc(Half v) {
#ifdef __F16C__
  return _cvtsh_ss(v.bits);
#else
  // Subnormals and zeros: shift the ten fraction bits up; the multiplication normalises them.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  float f = bits_to_float(magnitude) *
            bits_to_float(0x77800000u);  // 2^112, the difference of the exponent biases
  if (magnitude >= 0x0f800000u) f = bits_to_float(magnitude | 0x7f800000u);  // infinity, NaN
  return bits_to_float(float_to_bits(f) | sign);
#endif
}

FR_INLINE void from_acc(float v, float* p) { *p = v; }
FR_INLINE void from_acc(double v, double* p) { *p = v; }
FR_INLINE void from_acc(float v, BFloat16* p) {
  // Round to nearest, ties to even: add half of the last kept bit, less one where that bit is 0.
  const uint32_t u = float_to_bits(v);
  p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FR_CONVERSION void from_acc(float v, Half* p) {
#ifdef __F16C__
  p->bits = static_cast<uint16_t>(_cvtss_sh(v, 0));
#else
  const uint32_t sign = (float_to_bits(v) >> 16) & 0x8000u;
  const uint32_t u = float_to_bits(v) & 0x7fffffffu;
  uint32_t h;
  if (u > 0x7f800000u) {
    h = 0x7e00;  // NaN
  } else if (u >= 0x477ff000u) {
    h = 0x7c00;  // rounds to infinity
  } else if (u < 0x38800000u) {
    // Subnormal: adding 2^-1 aligns the fraction so that the hardware rounds at the right bit.
    h = float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000u;
  } else {
    h = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(h | sign);
#endif
}

// Vectors: load and widen, narrow and store. No alignment is assumed.

template <class V, class P>
FR_INLINE V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FR_INLINE Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
FR_INLINE Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }

typedef uint16_t U16 __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef uint32_t U32 __attribute__((vector_size(FR_VECTOR_BYTES)));

FR_INLINE Vec<float> load(const BFloat16* p) {
  const U32 wide = __builtin_convertvector(load_raw<U16>(p), U32) << 16;
  return load_raw<Vec<float>>(&wide);
}
FR_CONVERSION Vec<float> load(const Half* p) {
#if FR_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif FR_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

// Lanes 2p and 2p + 1 are both element 2p + kOdd. For float32 a part of the load, where the
// compiler would take a shuffle, which waits for a unit that multiplies.
template <int kOdd, class A>
FR_INLINE Vec<A> load_twice(const A* p) {
  LaneIndex<A> pairs;
  for (int i = 0; i < kLanes<A>; ++i) pairs[i] = i / 2 * 2 + kOdd;
  return __builtin_shuffle(load(p), pairs);
}
#if FR_VECTOR_BYTES == 64
template <int kOdd>
FR_INLINE Vec<float> load_twice(const float* p) {
  const __m512 v = (__m512)load(p);
  return (Vec<float>)(kOdd ? _mm512_movehdup_ps(v) : _mm512_moveldup_ps(v));
}
#elif FR_VECTOR_BYTES == 32
template <int kOdd>
FR_INLINE Vec<float> load_twice(const float* p) {
  const __m256 v = (__m256)load(p);
  return (Vec<float>)(kOdd ? _mm256_movehdup_ps(v) : _mm256_moveldup_ps(v));
}
#endif

FR_INLINE void store(Vec<float> v, float* p) { __builtin_memcpy(p, &v, sizeof v); }
FR_INLINE void store(Vec<double> v, double* p) { __builtin_memcpy(p, &v, sizeof v); }
FR_INLINE void store(Vec<float> v, BFloat16* p) {
  const U32 u = load_raw<U32>(&v);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 result = v != v ? U32{} + 0x7fc0u : rounded;
  const U16 narrow = __builtin_convertvector(result, U16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
// store, but subnormal numbers may become zero where that is faster.
template <class V, class T>
FR_INLINE void store_flushing(V v, T* p) {
  store(v, p);
}
#ifdef __AVX512BF16__
FR_INLINE void store_flushing(Vec<float> v, BFloat16* p) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
#endif
FR_CONVERSION void store(Vec<float> v, Half* p) {
#if FR_VECTOR_BYTES == 64
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, sizeof h);
#elif FR_VECTOR_BYTES == 32
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], p + i);
#endif
}

// Widened to float64: half as many elements, as wide a register.
typedef float HalfFloats __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef uint16_t QuarterU16 __attribute__((vector_size(FR_VECTOR_BYTES / 4)));
typedef uint32_t HalfU32 __attribute__((vector_size(FR_VECTOR_BYTES / 2)));

FR_INLINE HalfFloats load_half(const float* p) { return load_raw<HalfFloats>(p); }
FR_INLINE HalfFloats load_half(const BFloat16* p) {
  const HalfU32 wide = __builtin_convertvector(load_raw<QuarterU16>(p), HalfU32) << 16;
  return load_raw<HalfFloats>(&wide);
}
FR_CONVERSION HalfFloats load_half(const Half* p) {
#if FR_VECTOR_BYTES == 64
  return (HalfFloats)_mm256_cvtph_ps(load_raw<__m128i>(p));
#elif FR_VECTOR_BYTES == 32
  return (HalfFloats)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  HalfFloats v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

// Loads a whole vector of A from as many elements of any storage type.
template <class A>
struct Load {  // float
  template <class T>
  static FR_INLINE Vec<A> from(const T* p) {
    return load(p);
  }
};
template <>
struct Load<double> {
  static FR_INLINE Vec<double> from(const double* p) { return load(p); }
  template <class T>
  static FR_INLINE Vec<double> from(const T* p) {
    return __builtin_convertvector(load_half(p), Vec<double>);
  }
};

FR_INLINE void store(Vec<double> v, float* p) {
  const HalfFloats narrow = __builtin_convertvector(v, HalfFloats);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
FR_INLINE void from_acc(double v, float* p) { *p = static_cast<float>(v); }

}  // namespace FR_ISA
}  // namespace fr
