// What the CUDA part of this build contains. No torch or CUDA header: host code includes this file.
#pragma once

#include <string>
#include <vector>

namespace fr {

// The version of the CUDA toolkit that compiled this build, such as "13.0".
std::string cuda_toolkit_version();

// The architectures that this build contains code for, such as "sm_90".
std::vector<std::string> cuda_archs();

// Empty if code in this build runs on the device; else the reason why it does not.
std::string probe_device(int device);

}  // namespace fr
