// Max-pool of bfloat16 numbers after the ReLU of conv_bfloat16.h. No sign bit is set, so the
// numbers sort like their bits as integers, with NaN last, and one instruction compares 32 of them.
#pragma once

#include <immintrin.h>

#include "max_pool.h"

namespace fr {
namespace FR_ISA {

inline void max_pool_bfloat16(const PoolForward& f) {
  visit_windows<BFloat16>(f, [&](const Window<BFloat16>& w, BFloat16* out) {
    for (int64_t c = 0; c < f.c; c += 32) {
      const auto exist = static_cast<__mmask32>(0xffffffffu >> (32 - min_of(f.c - c, 32)));
      const auto load = [exist](const BFloat16* p) { return _mm512_maskz_loadu_epi16(exist, p); };
      const auto larger = [](__m512i a, __m512i b) { return _mm512_max_epi16(a, b); };
      _mm512_mask_storeu_epi16(out + c, exist, largest(w, c, load, larger));
    }
  });
}

}  // namespace FR_ISA
}  // namespace fr
