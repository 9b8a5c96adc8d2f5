// What the simulator's runtime offers to device code: see runtime/.
//
// A CUDA thread is a fiber. It runs until it must wait for others (a barrier, a collective of its
// warp); then the next thread that can go on does. The runtime is compiled once, without
// sanitizers: whatever memory a kernel touches is touched in the headers' inline functions, which
// are compiled with the kernel, so that ASan and the race checker see it and name the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fr::simt {

struct Geometry {
  dim3 grid, block;
  uint3 block_index;
};

struct Lane {
  uint3 index;
  const Geometry* geometry;
};

// The thread that is running on this OS thread.
extern constinit thread_local Lane* current __attribute__((tls_model("initial-exec")));

struct Kernel {
  const void* address;
  void (*call)(const void* arguments);
  const void* arguments;
};
cudaError_t execute(const Kernel& kernel, dim3 grid, dim3 block, size_t shared);

// Ends the launch with a report.
[[noreturn]] void fail(const char* what);

unsigned char* shared_begin();
// Where a buffer lies that a kernel takes at `offset` of the device's shared memory. Unlike there,
// a gap that may not be touched follows each buffer.
unsigned char* take_shared(size_t offset, size_t bytes, int index);

void barrier(const char* file, int line);
void sync_warp(uint32_t mask);
// What the lane `source` gave as `value`.
uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* name);

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int pending);

struct MatrixRow {
  uint64_t low, high;
};
void load_matrices(uint32_t (&r)[4], const MatrixRow& row);

enum class Operands { kFloat16, kBFloat16, kTf32 };
void multiply(Operands operands, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace fr::simt
