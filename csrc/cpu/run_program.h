// Runs programs on the CPU, for the operators that are programs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

namespace fr {

// run_program of one output, for another operator, whose name begins the messages.
at::Tensor run_as_program(const char* op, const at::Tensor& x, at::TensorList tensors,
                          at::IntArrayRef steps);

// What would run on an x of these sizes and dtype: for each step the shape of its result, the
// algorithm of its convolution ("": it is none), and the images of a micro-batch.
using StepReport = std::tuple<std::vector<int64_t>, std::string, int64_t>;
std::vector<StepReport> program_report(const std::vector<at::Tensor>& tensors,
                                       const std::vector<int64_t>& steps,
                                       const std::vector<int64_t>& outputs,
                                       const std::vector<int64_t>& sizes, at::ScalarType dtype);

}  // namespace fr
