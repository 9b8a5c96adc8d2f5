// Runs a convolution over a batch: cuts it into blocks and distributes them over threads.
#pragma once

#include "isa.h"
#include "thread_team.h"

namespace fr {

// One parallel loop of the team, which all of its threads call. Operands are channels-last,
// f.packed is laid out by pack_conv_weight. `winograd`: whether Winograd's algorithm may run.
void run_conv(ThreadTeam& team, DType dtype, const ConvForward& f, bool winograd);

// Convolution, ReLU and max-pool, on ATen's threads. y is the pooled result; f.y is not used.
void run_conv_max_pool(DType dtype, ConvForward f, PoolForward pool, void* y);

// The name of the algorithm that run_conv chooses for such a convolution: "direct", "winograd 4x4"
// or "winograd 2x2".
const char* conv_algorithm(DType dtype, const ConvShape& shape, bool winograd);

}  // namespace fr
