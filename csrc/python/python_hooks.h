// What the operators' library asks Python, because LibTorch's stable interface does not say it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fr {

// pybind11 makes a TypeError of this wherever it catches it, in PyTorch's bindings as in ours.
inline void throw_python_type_error(const char* text) { throw pybind11::type_error(text); }

// Whether PyTorch lets convolutions of float32 run in tf32.
inline bool python_conv_allows_tf32() {
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object conv =
      pybind11::module_::import("torch").attr("backends").attr("cudnn").attr("conv");
  return std::string(pybind11::str(conv.attr("fp32_precision"))) == "tf32";
}

}  // namespace fr
