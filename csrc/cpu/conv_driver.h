// Runs a convolution kernel over a whole batch: cuts it into blocks and spreads them over threads.
#pragma once

#include "isa.h"

namespace fr {

// Channels-last operands; f.packed as pack_conv_weight lays it out.
void run_conv(DType dtype, ConvForward f);

// The same, then max-pool; f.y is not used. y is the pooled result.
void run_conv_max_pool(DType dtype, ConvForward f, PoolForward pool, void* y);

// The same by Winograd's algorithm, float32; f.packed as transform_conv_weight lays it out.
void run_winograd(const ConvForward& f);

// Whether that can compute this convolution; sizes of the input do not matter.
bool winograd_fits(const ConvShape& shape);

// The ways to compute a convolution.
enum class ConvAlgorithm { kDirect, kWinograd };

// The one that runs, and the only place where that is decided. `transformed`: whether the weight is
// there as transform_conv_weight lays it out.
ConvAlgorithm choose_algorithm(const ConvShape& shape, DType dtype, bool transformed);

// Its name for people: "direct" or "winograd".
const char* name_of(ConvAlgorithm algorithm);

}  // namespace fr
