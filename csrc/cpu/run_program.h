// Runs programs on the CPU, for the operators that are programs.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "../program.h"
#include "../tensor.h"

namespace fr {

// run_program of one output, for another operator, whose name begins the messages.
Tensor run_as_program(const char* op, const Tensor& x, TensorList tensors, IntArrayRef steps);

// What would run on an x of these sizes and dtype: for each step the shape of its result, the
// algorithm of its convolution ("": it is none), and the images of a micro-batch.
using StepReport = std::tuple<std::vector<int64_t>, std::string, int64_t>;
std::vector<StepReport> program_report(const Program& program, IntArrayRef sizes, ScalarType type);

}  // namespace fr
