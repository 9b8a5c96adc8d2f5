// Runs a convolution kernel over a whole batch: cuts it into blocks and spreads them over threads.
#pragma once

#include "isa.h"
#include "team.h"

namespace fr {

// This worker's share, one loop of its team. Channels-last operands; f.packed as pack_conv_weight
// lays it out. `winograd`: that algorithm may run, see conv_algorithm.
void run_conv(Worker& worker, DType dtype, const ConvForward& f, bool winograd);

// The same with ReLU, then max-pool; f.y is not used. y is the pooled result.
void run_conv_max_pool(DType dtype, ConvForward f, PoolForward pool, void* y);

// The name of the algorithm that run_conv takes for such a convolution: "direct", "winograd 4x4" or
// "winograd 2x2".
const char* conv_algorithm(DType dtype, const ConvShape& shape, bool winograd);

}  // namespace fr
