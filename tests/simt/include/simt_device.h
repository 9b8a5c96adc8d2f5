// Host twin of csrc/cuda/device.cuh, and what nvcc has built in, for a C++ compiler.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt_half.h"
#include "simt_runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Static shared memory would be a variable of each thread's own here.
#define __shared__ shared_memory_must_be_dynamic_in_this_project

#define FR_DEVICE inline __attribute__((always_inline))
#define FR_DYNAMIC_SHARED(name) unsigned char* const name = ::fr::simt::shared_begin()

#define threadIdx (::fr::simt::current->index)
#define blockIdx (::fr::simt::current->geometry->block_index)
#define blockDim (::fr::simt::current->geometry->block)
#define gridDim (::fr::simt::current->geometry->grid)
#define __syncthreads() ::fr::simt::barrier(__FILE__, __LINE__)

FR_DEVICE void __syncwarp(uint32_t mask = 0xffffffffu) { ::fr::simt::sync_warp(mask); }

namespace fr::simt {

template <class T>
FR_DEVICE T shuffle_from(uint32_t mask, T value, int source, const char* name) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, name);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

FR_DEVICE int lane_of_current() {
  const uint3& index = current->index;
  const dim3& block = current->geometry->block;
  return static_cast<int>((index.x + block.x * (index.y + block.y * index.z)) % 32);
}

}  // namespace fr::simt

// A lane whose source would lie outside of its segment of `width` lanes gets its own value.
template <class T>
FR_DEVICE T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int lane = ::fr::simt::lane_of_current();
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return ::fr::simt::shuffle_from(mask, value, from, "__shfl_sync");
}
template <class T>
FR_DEVICE T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = ::fr::simt::lane_of_current();
  const int from = (lane ^ bits) < (lane | (width - 1)) + 1 ? lane ^ bits : lane;
  return ::fr::simt::shuffle_from(mask, value, from, "__shfl_xor_sync");
}
template <class T>
FR_DEVICE T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = ::fr::simt::lane_of_current();
  const int from = (lane & (width - 1)) + static_cast<int>(delta) < width
                       ? lane + static_cast<int>(delta)
                       : lane;
  return ::fr::simt::shuffle_from(mask, value, from, "__shfl_down_sync");
}

// CUDA's: for floats the number, if one of the two is NaN.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
FR_DEVICE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
FR_DEVICE T max(T a, T b) {
  return a < b ? b : a;
}
FR_DEVICE float min(float a, float b) { return fminf(a, b); }
FR_DEVICE float max(float a, float b) { return fmaxf(a, b); }

namespace fr {

class SharedArena {
 public:
  FR_DEVICE explicit SharedArena(unsigned char*) {}

  template <class T>
  FR_DEVICE T* take(int count) {
    const size_t bytes = count * sizeof(T);
    void* const taken = simt::take_shared(offset_, bytes, buffers_++);
    offset_ += (bytes + 127) / 128 * 128;
    return static_cast<T*>(taken);
  }

 private:
  size_t offset_ = 0;
  int buffers_ = 0;
};

using SharedAddress = unsigned char*;

FR_DEVICE SharedAddress shared_address(void* p) { return static_cast<SharedAddress>(p); }
FR_DEVICE SharedAddress flipped(SharedAddress address, uintptr_t bits) {
  return reinterpret_cast<SharedAddress>(reinterpret_cast<uintptr_t>(address) ^ bits);
}
FR_DEVICE SharedAddress opaque(SharedAddress v) { return v; }
FR_DEVICE int opaque(int v) { return v; }
FR_DEVICE void store_shared_16(SharedAddress shared, uint4 v) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) {
    simt::fail("store_shared_16: the address is no multiple of 16");
  }
  *reinterpret_cast<uint4*>(shared) = v;
}

FR_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    simt::fail("cp_async_16: an address is no multiple of 16");
  }
  if (valid) {
    const volatile uint64_t* const halves = static_cast<const volatile uint64_t*>(global);
    static_cast<void>(halves[0] + halves[1]);
  }
#ifdef __SANITIZE_ADDRESS__
  // The race checker is told instead: there the runtime's own report says more.
  volatile uint64_t* const halves = static_cast<volatile uint64_t*>(shared);
  static_cast<void>(halves[0] + halves[1]);
#endif
  simt::copy_async(shared, global, valid);
}

FR_DEVICE void cp_async_commit() { simt::commit_copies(); }

template <int Pending>
FR_DEVICE void cp_async_wait() {
  simt::wait_copies(Pending);
}

FR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    simt::fail("ldmatrix_x4: an address is no multiple of 16");
  const uint64_t* const halves = static_cast<const uint64_t*>(row);
  simt::load_matrices(r, {halves[0], halves[1]});
}

FR_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::multiply(simt::Operands::kFloat16, d, a, b0, b1);
}
FR_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::multiply(simt::Operands::kBFloat16, d, a, b0, b1);
}
FR_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::multiply(simt::Operands::kTf32, d, a, b0, b1);
}

// Magnitude and sign are apart, so adding half a unit rounds ties away from zero.
FR_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto run = [](const void* c) {
    std::apply(static_cast<const Call*>(c)->kernel, static_cast<const Call*>(c)->arguments);
  };
  return simt::execute({reinterpret_cast<const void*>(kernel), run, &call}, grid, block, shared);
}

}  // namespace fr
