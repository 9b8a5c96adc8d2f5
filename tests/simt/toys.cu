// Small kernels that show what the simulator does: each instruction by itself, and each mistake
// that a build must report. Plain C functions launch them, so a test needs no more than ctypes.
#include "device.cuh"

namespace fr {

// Instructions. A thread's registers go in and come out as they are; what they mean is the test's.

struct MultiplyParams {
  int operands;  // 0: float16, 1: bfloat16, 2: tf32
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

__global__ void multiply_kernel(const __grid_constant__ MultiplyParams p) {
  const int warp = threadIdx.x / 32, thread = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = p.a[4 * thread + i];
    d[i] = p.d[4 * thread + i];
  }
  const uint32_t b0 = p.b[2 * thread], b1 = p.b[2 * thread + 1];
  // Warps do it more than once, so that they meet in an uneven way.
  for (int i = 0; i <= warp; ++i) {
    if (p.operands == 0) mma_m16n8k16_f16(d, a, b0, b1);
    if (p.operands == 1) mma_m16n8k16_bf16(d, a, b0, b1);
    if (p.operands == 2) mma_m16n8k8_tf32(d, a, b0, b1);
  }
  for (int i = 0; i < 4; ++i) p.d[4 * thread + i] = d[i];
}

// Thread t gives row t of 32, each 16 bytes.
__global__ void matrices_kernel(const uint4* rows, uint32_t* r) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  uint4* const kept = arena.take<uint4>(32);
  kept[threadIdx.x] = rows[threadIdx.x];
  __syncthreads();
  uint32_t loaded[4];
  ldmatrix_x4(loaded, kept + threadIdx.x);
  for (int i = 0; i < 4; ++i) r[4 * threadIdx.x + i] = loaded[i];
}

__global__ void round_kernel(const uint32_t* bits, uint32_t* rounded) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  rounded[at] = round_to_tf32(bits[at]);
}

// What each lane gets from each of the shuffles, one after another.
__global__ void shuffles_kernel(const float* values, float* out, int argument, int width) {
  const float v = values[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(0xffffffffu, v, argument, width);
  out[32 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, argument, width);
  out[64 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, argument, width);
}

// A three-stage pipeline: out is the sum of `steps` rows of 64 floats; rows of odd number count as
// zeros, and nothing of them may be read.
__global__ void pipeline_kernel(const float* rows, float* out, int steps) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  float* const stages = arena.take<float>(3 * 64);
  const int t = threadIdx.x;  // of 16
  const auto bring = [&](int step) {
    if (step < steps) {
      const bool valid = step % 2 == 0;
      cp_async_16(stages + step % 3 * 64 + 4 * t, valid ? rows + step * 64 + 4 * t : nullptr,
                  valid);
    }
    cp_async_commit();
  };
  bring(0);
  bring(1);
  float sum = 0.0f;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    __syncthreads();
    bring(step + 2);
    for (int i = 0; i < 4; ++i) sum += stages[step % 3 * 64 + i * 16 + t];
  }
  cp_async_wait<0>();
  out[t] = sum;
}

// Where a thread is, by all of the built-in variables.
__global__ void indices_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1000 * block + thread;
}

// The sum of a block's numbers, each 256 of them: barriers, shuffles and a partial mask.
__global__ void sum_kernel(const float* values, float* sums) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  float* const parts = arena.take<float>(8);
  float v = values[blockIdx.x * 256 + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x >= 8) return;
  v = parts[threadIdx.x];
  for (int lanes = 4; lanes > 0; lanes /= 2) v += __shfl_down_sync(0xffu, v, lanes, 8);
  if (threadIdx.x == 0) sums[blockIdx.x] = v;
}

// Mistakes. Each kernel is right but for the one thing that `wrong` switches on.

enum class Wrong {
  kNothing,
  kMissingBarrier,
  kMissingWarpBarrier,
  kWaitTooFew,
  kReadBeforeWait,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kDivergentBarrier,
  kReturnsBeforeBarrier,
  kBarriersApart,
  kDivergentShuffle,
  kCollectivesApart,
  kUninitialisedShared,
  kMisalignedCopy,
  kTooMuchShared,
  kEndsDuringCopy,
  kOverwritesWhileRead,
  kBlocksMeetInMemory,
  kIndexOutOfRegisters,
};

// 64 threads; `in` and `out` have 64 floats for each block.
__global__ void mistake_kernel(const float* in, float* out, Wrong wrong) {
  FR_DYNAMIC_SHARED(shared);
  SharedArena arena(shared);
  const bool greedy = wrong == Wrong::kTooMuchShared;
  float* const kept = arena.take<float>(greedy ? 1024 : 64);
  float* const copied = arena.take<float>(64);
  const int t = threadIdx.x;
  const float* const from = in + blockIdx.x * 64;
  float early = 0.0f;
  float* const to = out + (wrong == Wrong::kBlocksMeetInMemory ? 0 : blockIdx.x * 64);

  if (wrong != Wrong::kUninitialisedShared || t != 5) kept[t] = from[t];
  if (t < 16) {
    cp_async_16(copied + 4 * t + (wrong == Wrong::kMisalignedCopy), from + 4 * t, true);
    cp_async_commit();
    if (wrong == Wrong::kReadBeforeWait && t == 3) early = copied[4 * t];
    if (wrong == Wrong::kWaitTooFew) {
      cp_async_wait<1>();
    } else if (wrong != Wrong::kEndsDuringCopy) {
      cp_async_wait<0>();
    }
  }
  if (wrong == Wrong::kReturnsBeforeBarrier && t == 63) return;
  // The neighbour is in the other warp.
  if (wrong == Wrong::kDivergentBarrier) {
    if (t < 40) __syncthreads();
  } else if (wrong == Wrong::kBarriersApart && t >= 32) {
    __syncthreads();
  } else if (wrong != Wrong::kMissingBarrier) {
    __syncthreads();
  }
  const int neighbour = (t + 32) % 64;
  float v = kept[neighbour] + early;
  if (wrong != Wrong::kEndsDuringCopy) v += copied[neighbour];
  if (wrong == Wrong::kSharedOutOfBounds) v += kept[t + 2];
  if (wrong == Wrong::kGlobalOutOfBounds) v += in[t + 1 + (gridDim.x - 1) * 64];
  if (wrong == Wrong::kDivergentShuffle) {
    if (t % 32 < 20) v = __shfl_xor_sync(0xffffffffu, v, 1);
  } else if (wrong == Wrong::kCollectivesApart && t % 32 < 20) {
    v = __shfl_down_sync(0xffffffffu, v, 1);
  } else {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  }
  if (wrong == Wrong::kOverwritesWhileRead) kept[t] = v;
  if (wrong == Wrong::kIndexOutOfRegisters) {
    float few[4] = {v, v, v, v};
    v = few[(t + blockDim.x) / 30];
  }
  __syncthreads();

  // Lanes exchange values within their warp.
  kept[t] = v;
  if (wrong != Wrong::kMissingWarpBarrier) __syncwarp();
  to[t] = kept[t ^ 3];
}

}  // namespace fr

using fr::launch;

extern "C" {

int toy_multiply(int operands, int warps, const uint32_t* a, const uint32_t* b, float* d) {
  return launch(fr::multiply_kernel, dim3(1), dim3(32 * warps), 0, nullptr,
                fr::MultiplyParams{operands, a, b, d});
}

void toy_from_half(const __half* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = __half2float(from[i]);
}
void toy_to_half(const float* from, __half* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = __float2half_rn(from[i]);
}
void toy_from_bfloat16(const __nv_bfloat16* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = __bfloat162float(from[i]);
}
void toy_to_bfloat16(const float* from, __nv_bfloat16* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = __float2bfloat16_rn(from[i]);
}

int toy_matrices(const uint4* rows, uint32_t* r) {
  return launch(fr::matrices_kernel, dim3(1), dim3(32), 512, nullptr, rows, r);
}

int toy_round(const uint32_t* bits, uint32_t* rounded, int blocks) {
  return launch(fr::round_kernel, dim3(blocks), dim3(128), 0, nullptr, bits, rounded);
}

int toy_shuffles(const float* values, float* out, int argument, int width) {
  return launch(fr::shuffles_kernel, dim3(1), dim3(32), 0, nullptr, values, out, argument, width);
}

int toy_pipeline(const float* rows, float* out, int steps) {
  return launch(fr::pipeline_kernel, dim3(1), dim3(16), 768, nullptr, rows, out, steps);
}

int toy_indices(int* out) {
  return launch(fr::indices_kernel, dim3(3, 2, 2), dim3(5, 3, 2), 0, nullptr, out);
}

int toy_sum(const float* values, float* sums, int blocks) {
  return launch(fr::sum_kernel, dim3(blocks), dim3(256), 32, nullptr, values, sums);
}

int toy_mistake(const float* in, float* out, int blocks, int wrong) {
  return launch(fr::mistake_kernel, dim3(blocks), dim3(64), 512, nullptr, in, out,
                static_cast<fr::Wrong>(wrong));
}

int toy_launch(int grid_x, int grid_y, int block_x, int shared, int* out) {
  return launch(fr::indices_kernel, dim3(grid_x, grid_y), dim3(block_x), shared, nullptr, out);
}
}
