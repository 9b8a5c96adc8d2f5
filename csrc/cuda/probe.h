// What the CUDA half of this build holds. No torch header, no CUDA header: host code includes it.
#pragma once

#include <string>
#include <vector>

namespace fr {

// The toolkit that compiled it, such as "13.0".
std::string cuda_toolkit_version();

// Architectures that it holds code for, such as "sm_90".
std::vector<std::string> cuda_archs();

// Empty if code in this build runs on the given device; else why it does not.
std::string cuda_device_problem(int device);

}  // namespace fr
