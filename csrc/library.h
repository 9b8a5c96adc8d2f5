// What the operators' library offers to the Python module besides its operators: plain C++ types
// alone, so that the module needs neither PyTorch's headers nor its libraries.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace fr {

using Ints = std::vector<int64_t>;

// The PyTorch that the library was compiled with.
const char* torch_version();
// The oldest PyTorch that it runs with.
const char* torch_version_needed();

// CUDA's version and architectures; empty without CUDA.
std::string cuda_version();
std::vector<std::string> cuda_architectures();
// Empty if this build runs on that device, else the reason why it does not.
std::string cuda_device_problem(int device);

std::string isa_in_use();
std::vector<std::string> isas_of_this_machine();

std::vector<std::string> schemas();

// Dtypes by PyTorch's names, as in "float32".
int64_t packed_conv_weight_numel(const Ints& weight_shape, int64_t groups,
                                 const std::string& dtype);
std::string packed_conv_weight_dtype(const std::string& dtype);
std::string conv_algorithm_name(const Ints& input_shape, const Ints& weight_shape,
                                const Ints& stride, const Ints& padding, const Ints& dilation,
                                int64_t groups, const std::string& dtype, bool winograd);

double measured_peak_flops(const std::string& dtype);
std::map<std::string, double> measured_memory_bandwidth();

void release_results();
int64_t kept_result_bytes();

// Of the program with this number, which the operator keep_program has given it.
std::vector<std::tuple<Ints, std::string, int64_t>> report_program(int64_t program,
                                                                   const Ints& sizes,
                                                                   const std::string& dtype);
void release_program(int64_t program);

// Functions of the Python module, for what the library can't ask LibTorch's stable interface: how a
// TypeError is thrown, and whether convolutions of float32 may run in tf32.
void set_throw_type_error(void (*function)(const char* text));
void set_conv_allows_tf32(bool (*function)());

}  // namespace fr
