// The device that a host function runs on. Under FR_SIMT this is the simulator of the tests, and
// the operators are registered under another name, for CPU tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>

#include "../../box.h"
#include "../../tensor.h"
#include "../../tf32.h"

#ifdef FR_SIMT
#define FR_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet_simt, CPU, m)
#else
#define FR_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m)
#endif

namespace fr {

// Makes the device of a tensor the current one, until the end of the scope.
class DeviceScope {
#ifdef FR_SIMT
 public:
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  // Few, so that maps which are small enough for the simulator need several waves of blocks.
  int multiprocessors() const { return 8; }
#else
 public:
  explicit DeviceScope(const Tensor& x) : device_(x.device().index) {
    check(aoti_torch_create_device_guard(device_, &guard_), "device");
  }
  ~DeviceScope() { aoti_torch_delete_device_guard(guard_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaStream_t stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream), "stream");
    return static_cast<cudaStream_t>(stream);
  }
  int multiprocessors() const {
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_);
    return count;
  }

 private:
  static void check(AOTITorchError error, const char* what) {
    FR_CHECK(error == AOTI_TORCH_SUCCESS, "fused_resnet: PyTorch has no current CUDA ", what);
  }

  const int32_t device_;
  DeviceGuardHandle guard_ = nullptr;
#endif
};

// Uninitialised; under the simulator of the tests NaN, so that a kernel that leaves an element out
// is caught.
inline Tensor device_empty(IntArrayRef sizes, const Options& options,
                           MemoryFormat format = kContiguous) {
  Tensor t = empty(sizes, options, format);
#ifdef FR_SIMT
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.nbytes()));
#endif
  return t;
}

inline void check_launch(const char* op, cudaError_t error) {
#ifdef FR_SIMT
  FR_CHECK(error == cudaSuccess, op, ": the launch failed with error ", static_cast<int>(error));
#else
  FR_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
#endif
}

}  // namespace fr
