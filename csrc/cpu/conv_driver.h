// Runs a convolution over a batch: cuts it into blocks and distributes them over threads.
#pragma once

#include "isa.h"
#include "thread_team.h"

namespace fr {

// How a convolution is computed: Winograd's algorithm, or null for the direct sum.
struct ConvAlgorithm {
  const WinogradKernels* winograd;

  const char* name() const;  // "direct", "winograd 4x4" or "winograd 2x2"
};

// The faster one for a batch. `winograd`: whether Winograd's algorithm may be chosen. The bits of a
// result depend on the algorithm: the parts of a batch must use the algorithm of the whole batch.
ConvAlgorithm conv_algorithm(DType dtype, const ConvShape& shape, bool winograd);

// One parallel loop of the team, which all of its threads call. Operands are channels-last,
// f.packed is laid out by pack_conv_weight.
void run_conv(ThreadTeam& team, DType dtype, const ConvForward& f, ConvAlgorithm algorithm);

// Convolution, ReLU and max-pool, likewise. y is the pooled result; f.y is not used.
void run_conv_max_pool(ThreadTeam& team, DType dtype, const ConvForward& f, const PoolForward& pool,
                       void* y);

// Of an element.
int64_t bytes_of(DType dtype);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fr
