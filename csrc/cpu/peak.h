// Peak throughput of this machine on PyTorch's threads, measured by the kernels in kernels/peak.h.
#pragma once

#include "isa.h"

namespace fr {

// Floating-point operations per second on registers: float64 for kFloat64, bfloat16 dot products
// for kBFloat16 if the instruction set in use has them, else float32.
double peak_flops(DType dtype);

// Bytes per second for buffers larger than the caches: reading one, and copying one to another,
// where both the bytes read and the bytes written count.
struct Bandwidth {
  double read, copy;
};
Bandwidth memory_bandwidth();

}  // namespace fr
