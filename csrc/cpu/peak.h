// What this machine can do at most on ATen's threads, measured by the kernels in kernels/peak.h.
#pragma once

#include "isa.h"

namespace fr {

// Floating-point operations a second, in registers: float64's own, bfloat16's dot products where
// the machine and the instruction set in use have them, float32's else.
double peak_flops(DType dtype);

// Bytes a second, of buffers beyond the caches: one that is read; one copied to another, where read
// and written bytes count.
struct Bandwidth {
  double read, copy;
};
Bandwidth memory_bandwidth();

}  // namespace fr
