// Feature maps whose memory comes back: what one convolution of a network leaves is soon free, and
// the next result of that size can lie there.
#pragma once

#include <ATen/core/Tensor.h>

namespace fr {

// An uninitialised channels-last map. Its memory is kept when the last tensor that uses it goes,
// for the next map of the same size, up to kPooledBytes in all; any thread may ask and let go.
//
// Why: the C library gives large blocks back to the system, which clears them before it hands them
// out again. In a ResNet-50 that is up to 1500 pages a forward, a tenth of its time on two cores.
at::Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace fr
