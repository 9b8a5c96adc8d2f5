// Measures the peak throughput of one core, the reference of `fused-resnet bench --layers`.
//
// Arithmetic: chains of multiply-adds a = a * m + b on registers. Current cores start two per cycle
// with a latency of four to six cycles, so a dozen independent chains keep them busy.
// Memory: a buffer larger than every cache is summed, or copied, a vector at a time.
#pragma once

#include "vec.h"

namespace fr {
namespace FR_ISA {

// Chains: as many as the registers hold beside the two operands, in a number that unrolls evenly.
constexpr int kChains = FR_VECTOR_BYTES == 64 ? 24 : 12;

template <class A>
FR_INLINE void keep(const Vec<A>& v) {
  volatile A sink = v[0];
  (void)sink;
}

// Returns the floating-point operations done, a multiplication and an addition counted as two.
template <class A>
double multiply_add(int64_t iterations) {
  Vec<A> chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(static_cast<A>(i));
  // Converges to 1: neither infinities nor subnormals, which some cores slow down for.
  const Vec<A> m = broadcast(A(0.5)), b = broadcast(A(0.5));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * m + b;
  }
  Vec<A> sum{};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  keep<A>(sum);
  return 2.0 * kLanes<A> * kChains * static_cast<double>(iterations);
}

#ifdef __AVX512BF16__
// Pairs of bfloat16 products added to float32.
inline double dot_bfloat16(int64_t iterations) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh m = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], m, b);
  }
  Vec<float> sum{};
  for (int i = 0; i < kChains; ++i) sum += (Vec<float>)chain[i];
  keep<float>(sum);
  return 4.0 * kLanes<float> * kChains * static_cast<double>(iterations);
}
#endif

// count: elements, a multiple of 8 vectors.
inline void read_memory(const float* from, int64_t count) {
  Vec<float> sum[8] = {};
  for (int64_t i = 0; i < count; i += 8 * kLanes<float>) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += load(from + i + j * kLanes<float>);
  }
  Vec<float> all{};
  for (int j = 0; j < 8; ++j) all += sum[j];
  keep<float>(all);
}

inline void copy_memory(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 8 * kLanes<float>) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      store(load(from + i + j * kLanes<float>), to + i + j * kLanes<float>);
    }
  }
}

}  // namespace FR_ISA
}  // namespace fr
