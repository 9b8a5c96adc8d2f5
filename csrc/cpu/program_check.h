// A program's steps, checked and decoded: the shapes of all values, and what kernels need of each
// step but its maps.
#pragma once

#include <vector>

#include "../program.h"
#include "../tensor.h"
#include "isa.h"
#include "layers.h"

namespace fr {

constexpr const char* kRunProgram = "run_program";  // names the operator in errors

// The sizes of a value.
struct MapSizes {
  int64_t n, c, h, w;
  bool flat;  // (N, C), with h = w = 1

  int64_t image_numel() const { return c * h * w; }
  std::vector<int64_t> shape() const {
    return flat ? std::vector<int64_t>{n, c} : std::vector<int64_t>{n, c, h, w};
  }
};

// A step. Of the members after the activation, only those of its operation are set.
struct Step {
  Operation operation;
  int64_t input, residual;  // values; no residual: -1
  Activation activation;
  int64_t weight_bytes = 0;

  ConvForward conv{};
  bool winograd = false;
  PoolForward pool{};
  ZeroPad pad{};
  LinearForward linear{};
};

struct CheckedProgram {
  ScalarType type = ScalarType::Float;
  DType dtype = kFloat32;
  std::vector<MapSizes> values;
  std::vector<Step> steps;
  std::vector<int64_t> outputs;
  // Copies of the operands that were not contiguous.
  std::vector<Tensor> copies;

  int64_t image_bytes(int64_t value) const;
};

// Checks a call of run_program on an x of shape `sizes`, and of `like`'s dtype and device. Throws
// messages that begin with `op`, or with the number of the step if it is null. The result points
// to the memory of `tensors`, or of the copies.
CheckedProgram check_program(const char* op, IntArrayRef sizes, const Tensor& like,
                             TensorList tensors, IntArrayRef steps, IntArrayRef outputs);

}  // namespace fr
