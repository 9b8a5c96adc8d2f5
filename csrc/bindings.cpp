// The operators' library, and the Python module _C that loads it and says how it was built.
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include "checks.h"
#include "cpu/conv_driver.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/result_cache.h"
#include "cpu/run_program.h"
#include "program.h"
#include "schemas.h"
#ifdef FR_WITH_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

TORCH_LIBRARY(fused_resnet, m) {
  for (const char* schema : fr::kSchemas) m.def(schema);
}

namespace {

// With known batch statistics the forward of training is that of inference. It is an operator of
// its own because the gradients differ: in training the statistics depend on x.
at::Tensor bn_add_relu_apply(const at::Tensor& x, const std::optional<at::Tensor>& weight,
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
  m.impl("bn_add_relu_apply", &bn_add_relu_apply);
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

// input_shape is (N, C, H, W); the other arguments are those of conv_bn_add_relu_packed.
std::string conv_algorithm(const std::vector<int64_t>& input_shape,
                           const std::vector<int64_t>& weight_shape,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups,
                           at::ScalarType dtype, bool winograd) {
  const at::IntArrayRef input(input_shape);
  const fr::ConvShape s =
      fr::conv_shape("conv_algorithm", input, weight_shape, stride, padding, dilation, groups);
  return fr::conv_algorithm(fr::dtype_of(dtype), s, winograd).name();
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
  // Called for meta and fake tensors too, whose sizes no allocation has checked.
  const fr::ConvShape s = fr::weight_shape("pack_conv_weight", weight_shape, groups);
  return fr::kernels().of[fr::dtype_of(dtype)].packed_numel(s);
}

// The C++ object of a Python object, which has none if it was made by __new__ without __init__.
template <class T>
const T& initialized(const py::object& self) {
  if (!py::isinstance<T>(self) || !reinterpret_cast<py::detail::instance*>(self.ptr())
                                       ->get_value_and_holder()
                                       .holder_constructed()) {
    throw py::type_error("expected an object whose __init__ was called");
  }
  return self.cast<const T&>();
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
        "Empty if this build runs on that CUDA device, else the reason why it does not.");
  m.def("packed_conv_weight_numel", &packed_conv_weight_numel, py::arg("weight_shape"),
        py::arg("groups"), py::arg("dtype"),
        "Number of elements of what pack_conv_weight returns.");
  m.def("packed_conv_weight_dtype", &fr::packed_type, py::arg("dtype"),
        "Dtype of what pack_conv_weight returns for a weight of this dtype.");
  m.def("conv_algorithm", &conv_algorithm, py::arg("input_shape"), py::arg("weight_shape"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("dtype"), py::arg("winograd"),
        "The algorithm that conv_bn_add_relu_packed runs on the CPU.");
  m.def(
      "peak_flops", [](at::ScalarType dtype) { return fr::peak_flops(fr::dtype_of(dtype)); },
      "Measured floating-point operations per second of the CPU, on PyTorch's threads.");
  m.def("memory_bandwidth", &memory_bandwidth,
        "Measured memory bandwidth in bytes per second, on PyTorch's threads: read and copy.");
  m.def("release_results", &fr::release_results,
        "Returns the unused memory that is cached for results on the CPU to the system.");
  m.def("kept_result_bytes", &fr::kept_result_bytes,
        "Bytes of unused memory that are cached for results on the CPU.");
  m.def(
      "program_report", &fr::program_report, py::arg("tensors"), py::arg("steps"),
      py::arg("outputs"), py::arg("sizes"), py::arg("dtype"),
      "What run_program would run on the CPU for an x of these sizes and dtype: for each step the "
      "shape of its result, the algorithm of its convolution, and the images of a micro-batch.");
  using Program = fr::Program;
  const auto run_without_gil = torch::wrap_pybind_function_no_gil(
      [](const Program& program, const at::Tensor& x) { return program(x); });
  py::class_<Program>(m, "Program", "run_program with all arguments bound but x.")
      .def(py::init<Program::Tensors, Program::Ints, Program::Ints>(), py::arg("tensors"),
           py::arg("steps"), py::arg("outputs"))
      .def("__call__", [run_without_gil](const py::object& self, const at::Tensor& x) {
        return run_without_gil(initialized<Program>(self), x);
      });
  // The operators themselves, through the dispatcher, without the checks of
  // fused_resnet/ops/checks.py.
  const py::object ops = py::module_::import("torch").attr("ops").attr("fused_resnet");
  for (const std::string schema : fr::kSchemas) {
    const std::string name = schema.substr(0, schema.find('('));
    m.attr(name.c_str()) = ops.attr(name.c_str());
  }
}
