#include "conv_launch.cuh"

namespace fr {

template cudaError_t launch_conv<Tf32>(const ConvLaunch& call, cudaStream_t stream);

}  // namespace fr
