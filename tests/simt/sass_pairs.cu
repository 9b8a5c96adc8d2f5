// device.cuh's instructions, and with FR_CUTE NVIDIA's wrappers of the same: the machine code of
// each kernel must be equal.
#ifdef FR_CUTE
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "cutlass/numeric_conversion.h"
#else
#include "device.cuh"
#endif

__device__ __forceinline__ void copy_16(void* shared, const uint4* global, bool valid) {
#ifdef FR_CUTE
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*global, *static_cast<uint4*>(shared), valid);
#else
  fr::cp_async_16(shared, global, valid);
#endif
}

__device__ __forceinline__ void commit() {
#ifdef FR_CUTE
  cute::cp_async_fence();
#else
  fr::cp_async_commit();
#endif
}

template <int Pending>
__device__ __forceinline__ void wait() {
#ifdef FR_CUTE
  cute::cp_async_wait<Pending>();
#else
  fr::cp_async_wait<Pending>();
#endif
}

__device__ __forceinline__ void matrices(uint32_t (&r)[4], unsigned char* row) {
#ifdef FR_CUTE
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t*>(row), r[0], r[1], r[2], r[3]);
#else
  fr::ldmatrix_x4(r, row);
#endif
}

#ifdef FR_CUTE
#define FR_PRODUCT(ours, theirs) \
  theirs::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3])
#else
#define FR_PRODUCT(ours, theirs) fr::ours(d, a, b[0], b[1])
#endif

// A ring of three stages of 512 bytes, one thread one copy: cp.async, its groups and waits.
extern "C" __global__ void copies(const uint4* from, uint4* to, int steps) {
  __shared__ __align__(128) unsigned char ring[3 * 512];
  unsigned char* const mine = ring + threadIdx.x * 16;
  copy_16(mine, from + threadIdx.x, threadIdx.x < steps);
  commit();
  copy_16(mine + 512, from + 32 + threadIdx.x, threadIdx.x + 1 < steps);
  commit();
  copy_16(mine + 1024, from + 64 + threadIdx.x, threadIdx.x + 2 < steps);
  commit();
  wait<2>();
  to[threadIdx.x] = *reinterpret_cast<const uint4*>(mine);
  wait<1>();
  to[threadIdx.x + 32] = *reinterpret_cast<const uint4*>(mine + 512);
  // CuTe's wait for all is another instruction than a wait for all but none.
}

// ldmatrix, and the fragments that it brings multiplied.
#define FR_MULTIPLY(name, ours, theirs)                           \
  extern "C" __global__ void name(const uint4* from, float* to) { \
    __shared__ __align__(128) unsigned char rows[2 * 512];        \
    const int t = threadIdx.x;                                    \
    reinterpret_cast<uint4*>(rows)[t] = from[t];                  \
    reinterpret_cast<uint4*>(rows)[t + 32] = from[t + 32];        \
    __syncthreads();                                              \
    uint32_t a[4], b[4];                                          \
    float d[4] = {to[t], to[t + 32], to[t + 64], to[t + 96]};     \
    matrices(a, rows + t * 16);                                   \
    matrices(b, rows + 512 + (t ^ 1) * 16);                       \
    FR_PRODUCT(ours, theirs);                                     \
    for (int i = 0; i < 4; ++i) to[t + 32 * i] = d[i];            \
  }
FR_MULTIPLY(multiply_f16, mma_m16n8k16_f16, cute::SM80_16x8x16_F32F16F16F32_TN)
FR_MULTIPLY(multiply_bf16, mma_m16n8k16_bf16, cute::SM80_16x8x16_F32BF16BF16F32_TN)
FR_MULTIPLY(multiply_tf32, mma_m16n8k8_tf32, cute::SM80_16x8x8_F32TF32TF32F32_TN)
