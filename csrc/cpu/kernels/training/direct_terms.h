// What a step of a direct convolution's product multiplies, and how its operands lie in scratch:
// one term of the sum, or a pair of them.
//
// Rows are [pixel][depth] and panels [depth / kTerms][two vectors of channels][kTerms], so the
// kTerms elements that meet in one step are a word of the accumulator's width on both sides: the
// row's word is spread over a vector, the panel's words are loaded.
#pragma once

#include "../transpose.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fr {
namespace FR_ISA {

template <class M>
using Element = typename M::Element;
template <class M>
constexpr int64_t kBytes = sizeof(Element<M>);
// Elements of a vector of words.
template <class M>
constexpr int64_t kWords = kLanes<typename M::A> * M::kTerms;

template <class Arithmetic>
struct SingleTerms {
  using A = Arithmetic;
  using Element = A;
  using Word = Vec<A>;
  static constexpr int64_t kTerms = 1;

  static FR_INLINE Word words(const Element* w) { return load(w); }
  static FR_INLINE Word spread(const Element* x) { return broadcast<A>(*x); }
  static FR_INLINE Vec<A> add(Vec<A> sum, Word x, Word w) { return sum + x * w; }

  // A row's vector of channels.
  static FR_INLINE void put(Vec<A> v, Element* to) { store(v, to); }
  // A vector of words from their terms.
  static FR_INLINE void put_words(const Vec<A> (&terms)[1], Element* to) { store(terms[0], to); }
  // Words [i][lane] from the rows of a square of words, `step` elements apart.
  template <class T, class To>
  static FR_INLINE void transpose_words(const T* from, int64_t step, To to) {
    transpose_square<A>(from, step, [&](int64_t i, Vec<A> v) { store(v, to(i)); });
  }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 by vdpbf16ps, which adds the products of both to a float32 sum: twice the
// multiply-adds of a float32 instruction, from half the bytes. It takes subnormal numbers for zero.
struct PairTerms {
  using A = float;
  using Element = BFloat16;
  using Word = __m512bh;
  static constexpr int64_t kTerms = 2;

  static FR_INLINE Word words(const Element* w) { return load_raw<Word>(w); }
  static FR_INLINE Word spread(const Element* x) {
    return (Word)_mm512_set1_epi32(load_raw<int32_t>(x));
  }
  static FR_INLINE Vec<A> add(Vec<A> sum, Word x, Word w) {
    return (Vec<A>)_mm512_dpbf16_ps((__m512)sum, x, w);
  }

  static FR_INLINE void put(Vec<A> v, Element* to) { store_flushing(v, to); }
  static FR_INLINE void put_words(const Vec<A> (&terms)[2], Element* to) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)terms[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)terms[1]));
    const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    __builtin_memcpy(to, &pairs, sizeof pairs);
  }
  // Only moves: no arithmetic touches a word.
  template <class To>
  static FR_INLINE void transpose_words(const BFloat16* from, int64_t step, To to) {
    const float* words = reinterpret_cast<const float*>(from);
    transpose_square<A>(words, step / kTerms,
                        [&](int64_t i, Vec<A> v) { __builtin_memcpy(to(i), &v, sizeof v); });
  }
};
#endif

}  // namespace FR_ISA
}  // namespace fr
