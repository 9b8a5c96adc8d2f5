// What kernels use beyond plain CUDA C++: instructions without an intrinsic, one function each,
// shared memory, and the launch. The only file with inline PTX.
//
// Kernels are single source. Under FR_SIMT this file is replaced by its counterpart in tests/simt,
// which defines the same names for a C++ compiler and simulates every thread on the CPU.
#pragma once

#ifdef FR_SIMT
#include "simt_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define FR_DEVICE __device__ __forceinline__
// The dynamic shared memory of the launch, in bytes, aligned for every use here.
#define FR_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace fr {

// Hands out dynamic shared memory, 128-byte aligned, one buffer after the other.
class SharedArena {
 public:
  FR_DEVICE explicit SharedArena(unsigned char* begin) : next_(begin) {}

  template <class T>
  FR_DEVICE T* take(int count) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 127) / 128 * 128;
    return taken;
  }

 private:
  unsigned char* next_;
};

// An address in shared memory: 32 bits, to which offsets can be added.
using SharedAddress = uint32_t;

FR_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// The address that differs in these bits.
FR_DEVICE SharedAddress flipped(SharedAddress address, int bits) { return address ^ bits; }

// The same number, opaque to the compiler, which can then recompute neither it nor what is derived
// from it elsewhere. For use before a loop that keeps an address in a register, where nvcc would
// rather compute it in each iteration; inside a branch it takes no registers outside of it.
FR_DEVICE SharedAddress opaque(SharedAddress v) {
  asm volatile("" : "+r"(v));
  return v;
}
FR_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

FR_DEVICE void store_shared_16(SharedAddress shared, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Starts a copy of 16 bytes that bypasses L1; if not `valid`, writes zeros and reads nothing.
FR_DEVICE void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}
FR_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  cp_async_16(shared_address(shared), global, valid);
}

FR_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the newest `Pending` groups of this thread are pending.
template <int Pending>
FR_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8i to 8i + 7 hold the row addresses of matrix i.
FR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r, shared_address(row));
}

// d += a b; a is 16 x k, row-major, b is k x 8, column-major, accumulators are float32.
FR_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FR_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FR_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The bits of a float32 rounded to tf32, to nearest with ties away from zero.
FR_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// Enqueues a kernel. More than 48 KiB of shared memory must be requested first, which is cheap and
// allowed during graph capture.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fr

#endif  // FR_SIMT
