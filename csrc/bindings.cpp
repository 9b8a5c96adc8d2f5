// The operators' library, and the Python module _C that loads it and says how it was built.
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/conv_driver.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/result_cache.h"
#include "held_row.h"
#include "schemas.h"
#include "unchanged.h"
#ifdef FR_WITH_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

TORCH_LIBRARY(fused_resnet, m) {
  for (const char* schema : fr::kSchemas) m.def(schema);
}

namespace {

// Given its statistics, batch norm in training is batch norm in inference. It is an operator of its
// own because its gradient is not: there the statistics depend on x.
at::Tensor bn_add_relu_given(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const at::Tensor& mean,
                             const at::Tensor& var, const std::optional<at::Tensor>& residual,
                             double eps, bool relu) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fused_resnet::bn_add_relu", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
              const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
              const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
              const std::optional<at::Tensor>&, bool, double, bool)>();
  return std::get<0>(op.call(x, weight, bias, mean, var, residual, false, eps, relu));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m) {
  m.impl("bn_add_relu_given", &bn_add_relu_given);
}

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = "gcc-compatible " __VERSION__;
#ifdef FR_WITH_CUDA
  info["cuda"] = fr::cuda_toolkit_version();
  info["cuda_archs"] = fr::cuda_archs();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["isa"] = fr::kernels().isa;
  info["isa_supported"] = fr::supported_isas();
  return info;
}

fr::ConvShape shape_of_weight(const std::vector<int64_t>& sizes, int64_t groups) {
  fr::ConvShape s{};
  s.k = sizes.at(0);
  s.c = sizes.at(1) * groups;
  s.kh = sizes.at(2);
  s.kw = sizes.at(3);
  s.groups = groups;
  return s;
}

// input_shape is x's (N, C, H, W); the rest as conv_bn_add_relu_packed has it.
std::string conv_algorithm(const std::vector<int64_t>& input_shape,
                           const std::vector<int64_t>& weight_shape,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups,
                           at::ScalarType dtype, bool winograd) {
  fr::ConvShape s = shape_of_weight(weight_shape, groups);
  s.n = input_shape.at(0);
  s.h = input_shape.at(2);
  s.w = input_shape.at(3);
  s.stride_h = stride.at(0);
  s.stride_w = stride.at(1);
  s.pad_h = padding.at(0);
  s.pad_w = padding.at(1);
  s.dilation_h = dilation.at(0);
  s.dilation_w = dilation.at(1);
  return fr::conv_algorithm(fr::dtype_of(dtype), s, winograd);
}

py::dict memory_bandwidth() {
  const fr::Bandwidth measured = fr::memory_bandwidth();
  py::dict result;
  result["read"] = measured.read;
  result["copy"] = measured.copy;
  return result;
}

int64_t packed_conv_weight_numel(const std::vector<int64_t>& weight_shape, int64_t groups,
                                 at::ScalarType dtype) {
  return fr::kernels().of[fr::dtype_of(dtype)].packed_numel(shape_of_weight(weight_shape, groups));
}

std::string cuda_device_problem(int device) {
#ifdef FR_WITH_CUDA
  return fr::cuda_device_problem(device);
#else
  (void)device;
  return "built without CUDA";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // A wrong FUSED_RESNET_ISA is an error at import, in one line, not at the first call.
  try {
    fr::kernels();
  } catch (const c10::Error& error) {
    throw py::value_error(error.what_without_backtrace());
  }
  m.def("build_info", &build_info, "How the extension was built, and the instruction set in use.");
  m.def(
      "schemas",
      [] { return std::vector<std::string>(std::begin(fr::kSchemas), std::end(fr::kSchemas)); },
      "Every operator's schema.");
  m.def("cuda_device_problem", &cuda_device_problem,
        "Empty if this build runs on that CUDA device, else why it does not.");
  m.def("packed_conv_weight_numel", &packed_conv_weight_numel,
        "Elements of what pack_conv_weight returns.");
  m.def("packed_conv_weight_dtype", &fr::packed_type, "Their dtype, for weights of this one.");
  m.def("conv_algorithm", &conv_algorithm,
        "What conv_bn_add_relu_packed runs on the CPU: direct or winograd.");
  m.def(
      "peak_flops", [](at::ScalarType dtype) { return fr::peak_flops(fr::dtype_of(dtype)); },
      "Measured floating-point operations a second of the CPU, on PyTorch's threads.");
  m.def("memory_bandwidth", &memory_bandwidth,
        "Measured bytes a second from memory, on PyTorch's threads: read, and copy.");
  m.def("release_results", &fr::release_results,
        "Gives the free memory that is kept for results on the CPU back to the system.");
  m.def("kept_result_bytes", &fr::kept_result_bytes, "Bytes of it that are kept now.");
  m.def("unchanged", &fr::unchanged, "Whether modules' dictionaries are what they were.");
  using Row = fr::HeldRow;
  using Bools = std::vector<bool>;
  py::class_<Row>(m, "ResidualRow", "residual_row with all arguments but its map.")
      .def(py::init<Row::Tensors, Row::Tensors, Row::Tensors, Row::Ints, const Bools&, Row::Ints,
                    Row::Ints, Row::Ints, Row::Ints, const Bools&>())
      .def("__call__", torch::wrap_pybind_function_no_gil(
                           [](const Row& row, const at::Tensor& x) { return row(x); }));
  // The operators themselves, through the dispatcher, for those who want them bare.
  const py::object ops = py::module_::import("torch").attr("ops").attr("fused_resnet");
  for (const std::string schema : fr::kSchemas) {
    const std::string name = schema.substr(0, schema.find('('));
    m.attr(name.c_str()) = ops.attr(name.c_str());
  }
}
