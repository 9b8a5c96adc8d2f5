// Every operator's schema, and the Python module _C that loads them and says how it was built.
//
// All operators are functional: none writes to an argument. Running statistics are moved by
// fused_resnet/ops.py from the batch statistics that bn_add_relu returns, as autograd wants it.
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/conv_driver.h"
#include "cpu/isa.h"
#ifdef FR_WITH_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

TORCH_LIBRARY(fused_resnet, m) {
  // y, and in training the batch's mean and biased variance (else empty).
  m.def(
      "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, Tensor? residual, bool training, float eps, bool relu) "
      "-> (Tensor, Tensor, Tensor)");
  // Gradients of x, weight, bias, residual; y is needed with relu only.
  m.def(
      "bn_add_relu_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, "
      "Tensor var, bool training, float eps, bool relu, bool need_residual) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_bn_add_relu(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor mean, Tensor var, Tensor? residual, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, float eps, bool relu) -> Tensor");
  m.def(
      "conv_bn_relu_maxpool(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor mean, Tensor var, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float eps, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) "
      "-> Tensor");
  m.def("pack_conv_weight(Tensor weight, int groups) -> Tensor");
  m.def("unpack_conv_weight(Tensor packed, int[] weight_shape, int groups) -> Tensor");
  // For Winograd's algorithm; empty where that does not apply.
  m.def(
      "transform_conv_weight(Tensor weight, int[2] stride, int[2] dilation, int groups) -> Tensor");
  m.def(
      "conv_bn_add_relu_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
      "Tensor? residual, Tensor? transformed, int[] weight_shape, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool relu) -> Tensor");
  m.def(
      "conv_bn_relu_maxpool_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
      "int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor");
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

bool winograd_fits(const std::vector<int64_t>& weight_shape, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  fr::ConvShape s = shape_of_weight(weight_shape, groups);
  s.stride_h = stride.at(0);
  s.stride_w = stride.at(1);
  s.dilation_h = dilation.at(0);
  s.dilation_w = dilation.at(1);
  return fr::winograd_fits(s);
}

int64_t packed_conv_weight_numel(const std::vector<int64_t>& weight_shape, int64_t groups,
                                 bool is_double) {
  const fr::ConvShape s = shape_of_weight(weight_shape, groups);
  return fr::packed_numel(s, fr::kernels().panel[is_double ? fr::kFloat64 : fr::kFloat32]);
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
  m.def("cuda_device_problem", &cuda_device_problem,
        "Empty if this build runs on that CUDA device, else why it does not.");
  m.def("packed_conv_weight_numel", &packed_conv_weight_numel,
        "Elements of what pack_conv_weight returns.");
  m.def("winograd_fits", &winograd_fits,
        "Whether transform_conv_weight returns anything but an empty tensor for float32.");
  // The operators themselves, through the dispatcher, for those who want them bare.
  const py::object ops = py::module_::import("torch").attr("ops").attr("fused_resnet");
  for (const char* name :
       {"bn_add_relu", "bn_add_relu_backward", "conv_bn_add_relu", "conv_bn_relu_maxpool",
        "pack_conv_weight", "unpack_conv_weight", "transform_conv_weight",
        "conv_bn_add_relu_packed", "conv_bn_relu_maxpool_packed"}) {
    m.attr(name) = ops.attr(name);
  }
}
