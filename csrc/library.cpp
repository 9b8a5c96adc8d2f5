// The operators' library.
#include "library.h"

#include <torch/headeronly/version.h>

#include <atomic>
#include <utility>

#include "box.h"
#include "checks.h"
#include "cpu/conv_driver.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/result_cache.h"
#include "cpu/run_program.h"
#include "program.h"
#include "schemas.h"
#include "tf32.h"
#ifdef FR_WITH_CUDA
#include "cuda/probe.h"
#endif

namespace {

// Whether the schema is that of an operator.
bool is_of(std::string_view schema, std::string_view name) {
  return schema.substr(0, name.size()) == name && schema.substr(name.size(), 1) == "(";
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_resnet, m) {
  for (const char* schema : fr::kSchemas) m.def(schema);
  for (const std::string name : fr::kAroundLibrary) {
    for (const char* schema : fr::kSchemas) {
      if (is_of(schema, name)) m.def((name + "_library" + (schema + name.size())).c_str());
    }
  }
  for (const char* schema : fr::kKeptProgramSchemas) m.def(schema);
}

namespace fr {
namespace {

std::atomic<bool (*)()> ask_for_tf32{nullptr};

constexpr std::pair<const char*, ScalarType> kDtypes[] = {{"float32", ScalarType::Float},
                                                          {"float64", ScalarType::Double},
                                                          {"bfloat16", ScalarType::BFloat16},
                                                          {"float16", ScalarType::Half}};

ScalarType type_of(const std::string& dtype) {
  for (const auto& [name, type] : kDtypes) {
    if (dtype == name) return type;
  }
  throw_type_error("fused_resnet: expected dtype float32, float64, bfloat16 or float16, got " +
                   dtype);
}

}  // namespace

bool conv_allows_tf32() {
  bool (*const ask)() = ask_for_tf32;
  return ask == nullptr || ask();
}

void set_conv_allows_tf32(bool (*function)()) { ask_for_tf32 = function; }

const char* torch_version() {
  return C10_STRINGIZE(TORCH_VERSION_MAJOR) "." C10_STRINGIZE(
      TORCH_VERSION_MINOR) "." C10_STRINGIZE(TORCH_VERSION_PATCH);
}

const char* torch_version_needed() { return "2.11"; }

#ifdef FR_WITH_CUDA
std::string cuda_version() { return cuda_toolkit_version(); }
std::vector<std::string> cuda_architectures() { return cuda_archs(); }
std::string cuda_device_problem(int device) { return probe_device(device); }
#else
std::string cuda_version() { return ""; }
std::vector<std::string> cuda_architectures() { return {}; }
std::string cuda_device_problem(int) { return "built without CUDA"; }
#endif

std::string isa_in_use() { return kernels().isa; }
std::vector<std::string> isas_of_this_machine() { return supported_isas(); }

std::vector<std::string> schemas() { return {std::begin(kSchemas), std::end(kSchemas)}; }

// Called for meta and fake tensors too, whose sizes no allocation has checked.
int64_t packed_conv_weight_numel(const Ints& weight_shape, int64_t groups,
                                 const std::string& dtype) {
  const ConvShape s = fr::weight_shape("pack_conv_weight", weight_shape, groups);
  return kernels().of[dtype_of(type_of(dtype))].packed_numel(s);
}

std::string packed_conv_weight_dtype(const std::string& dtype) {
  const ScalarType packed = packed_type(type_of(dtype));
  for (const auto& [name, type] : kDtypes) {
    if (packed == type) return name;
  }
  return "";
}

std::string conv_algorithm_name(const Ints& input_shape, const Ints& weight_shape,
                                const Ints& stride, const Ints& padding, const Ints& dilation,
                                int64_t groups, const std::string& dtype, bool winograd) {
  const ConvShape s =
      conv_shape("conv_algorithm", input_shape, weight_shape, stride, padding, dilation, groups);
  return conv_algorithm(dtype_of(type_of(dtype)), s, winograd).name();
}

double measured_peak_flops(const std::string& dtype) {
  return peak_flops(dtype_of(type_of(dtype)));
}

std::map<std::string, double> measured_memory_bandwidth() {
  const Bandwidth measured = memory_bandwidth();
  return {{"read", measured.read}, {"copy", measured.copy}};
}

std::vector<std::tuple<Ints, std::string, int64_t>> report_program(int64_t program,
                                                                   const Ints& sizes,
                                                                   const std::string& dtype) {
  return program_report(*kept_program(program), sizes, type_of(dtype));
}

}  // namespace fr
