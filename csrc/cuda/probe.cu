#include <cuda_runtime.h>

#include "probe.h"

namespace fr {
namespace {

// Empty: whether the runtime finds code for the device in this kernel is all that matters.
__global__ void probe_kernel() {}

}  // namespace

std::string cuda_toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  for (const int arch : {__CUDA_ARCH_LIST__}) archs.push_back("sm_" + std::to_string(arch / 10));
  return archs;
}

std::string probe_device(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(before);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clear the error for the next caller
  return cudaGetErrorString(error);
}

}  // namespace fr
