// The device that a host function runs on. Under FR_SIMT this is the simulator of the tests, and
// the operators are registered under another name, for CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#ifdef FR_SIMT
#define FR_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(fused_resnet_simt, CPU, m)
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define FR_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m)
#endif

namespace fr {

// Makes the device of a tensor the current one, until the end of the scope.
class DeviceScope {
#ifdef FR_SIMT
 public:
  explicit DeviceScope(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  // Few, so that maps which are small enough for the simulator need several waves of blocks.
  int multiprocessors() const { return 8; }
#else
 public:
  explicit DeviceScope(const at::Tensor& x) : guard_(x.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  int multiprocessors() const {
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, guard_.current_device().index());
    return count;
  }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

inline void check_launch(const char* op, cudaError_t error) {
#ifdef FR_SIMT
  TORCH_CHECK(error == cudaSuccess, op, ": the launch failed with error ", static_cast<int>(error));
#else
  TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
#endif
}

}  // namespace fr
