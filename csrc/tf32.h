// Whether PyTorch lets convolutions of float32 run in tf32.
#pragma once

namespace fr {

// LibTorch's stable interface does not say; the Python module does. Without one, PyTorch's default.
bool conv_allows_tf32();

}  // namespace fr
