// The Python module _C: loads the operators' library and says how it was built. It has no header of
// PyTorch: tensors and dtypes are Python's own objects here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../library.h"
#include "python_hooks.h"

namespace py = pybind11;

// Arguments by their Python types' names, which the docstrings then have.
namespace {

struct Dtype {
  std::string name;
};

struct AnyTensor {
  py::object object;
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Dtype> {
  PYBIND11_TYPE_CASTER(Dtype, const_name("torch.dtype"));

  bool load(handle source, bool) {
    if (!isinstance(source, module_::import("torch").attr("dtype"))) return false;
    value.name = std::string(str(source)).substr(std::string("torch.").size());
    return true;
  }
  static handle cast(const Dtype& dtype, return_value_policy, handle) {
    return object(module_::import("torch").attr(dtype.name.c_str())).release();
  }
};

template <>
struct type_caster<AnyTensor> {
  PYBIND11_TYPE_CASTER(AnyTensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    static PyObject* const type = object(module_::import("torch").attr("Tensor")).release().ptr();
    if (!PyObject_TypeCheck(source.ptr(), reinterpret_cast<PyTypeObject*>(type))) return false;
    value.object = reinterpret_borrow<object>(source);
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

// PyTorch's Python functions that every call needs, looked up once.
struct Torch {
  py::object run_program, keep_program, run_kept;
  py::object dispatch_modes, tensor, parameter;
  const py::str is_cpu_{"is_cpu"};

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object ops = torch.attr("ops").attr("fused_resnet");
    run_program = ops.attr("run_program").attr("default");
    keep_program = ops.attr("keep_program").attr("default");
    // The function behind the overload object saves a tenth of a small network's overhead.
    const py::object kept = ops.attr("run_program").attr("kept");
    run_kept = py::getattr(kept, "_op", kept);
    dispatch_modes = torch.attr("_C").attr("_len_torch_dispatch_stack");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
  }

  static const Torch& instance() {
    static const Torch* const torch = new Torch;  // never destroyed: Python may be gone by then
    return *torch;
  }

  // The results of a kept program.
  py::list call_kept(const py::object& x, const py::object& number) const {
    PyObject* const arguments[] = {x.ptr(), number.ptr()};
    const auto results = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(run_kept.ptr(), arguments, 2, nullptr));
    if (!results) throw py::error_already_set();
    return results;
  }

  // Whether nothing but a plain tensor on the CPU is in this call.
  bool is_plain(const py::object& x) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
    if (type != tensor.ptr() && type != parameter.ptr()) return false;
    const auto is_cpu = py::reinterpret_steal<py::object>(PyObject_GetAttr(x.ptr(), is_cpu_.ptr()));
    const auto modes = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(dispatch_modes.ptr()));
    if (!is_cpu || !modes) throw py::error_already_set();
    return is_cpu.ptr() == Py_True && PyLong_AsLong(modes.ptr()) == 0;
  }
};

// A program that the library keeps.
class Number {
 public:
  Number(const py::object& tensors, const py::object& steps, const py::object& outputs)
      : number_(Torch::instance().keep_program(tensors, steps, outputs).cast<int64_t>()) {}
  ~Number() { fr::release_program(number_); }
  Number(const Number&) = delete;
  Number& operator=(const Number&) = delete;

  int64_t get() const { return number_; }

 private:
  const int64_t number_;
};

// run_program with all arguments bound but x.
class Program {
 public:
  Program(const std::vector<AnyTensor>& tensors, const fr::Ints& steps, const fr::Ints& outputs)
      : steps_(py::cast(steps)), outputs_(py::cast(outputs)) {
    for (const AnyTensor& t : tensors) tensors_.append(t.object);
  }

  py::list operator()(const py::object& x) {
    const Torch& torch = Torch::instance();
    if (!torch.is_plain(x)) return torch.run_program(x, tensors_, steps_, outputs_);
    if (!number_) {
      // Another thread may come first while this one waits for Python's lock.
      auto made = std::make_unique<Number>(tensors_, steps_, outputs_);
      if (!number_) {
        number_ = std::move(made);
        number_object_ = py::cast(number_->get());
      }
    }
    return torch.call_kept(x, number_object_);
  }

 private:
  py::list tensors_;
  const py::object steps_, outputs_;
  std::unique_ptr<Number> number_;
  py::object number_object_;
};

// The C++ object of a Python object, which has none if it was made by __new__ without __init__.
template <class T>
T& initialized(const py::object& self) {
  if (!py::isinstance<T>(self) || !reinterpret_cast<py::detail::instance*>(self.ptr())
                                       ->get_value_and_holder()
                                       .holder_constructed()) {
    throw py::type_error("expected an object whose __init__ was called");
  }
  return self.cast<T&>();
}

py::dict build_info() {
  py::dict info;
  info["torch"] = fr::torch_version();
  info["torch_needed"] = fr::torch_version_needed();
  info["compiler"] = "gcc-compatible " __VERSION__;
  const std::string cuda = fr::cuda_version();
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["cuda_archs"] = fr::cuda_architectures();
  info["isa"] = fr::isa_in_use();
  info["isa_supported"] = fr::isas_of_this_machine();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fr::set_throw_type_error(&fr::throw_python_type_error);
  fr::set_conv_allows_tf32(&fr::python_conv_allows_tf32);
  fr::isa_in_use();  // a wrong FUSED_RESNET_ISA is an error at import, not at the first call
  m.def("build_info", &build_info, "How the extension was built, and the instruction set in use.");
  m.def("schemas", &fr::schemas, "Every operator's schema.");
  m.def("cuda_device_problem", &fr::cuda_device_problem,
        "Empty if this build runs on that CUDA device, else the reason why it does not.");
  m.def(
      "packed_conv_weight_numel",
      [](const fr::Ints& weight_shape, int64_t groups, const Dtype& dtype) {
        return fr::packed_conv_weight_numel(weight_shape, groups, dtype.name);
      },
      py::arg("weight_shape"), py::arg("groups"), py::arg("dtype"),
      "Number of elements of what pack_conv_weight returns.");
  m.def(
      "packed_conv_weight_dtype",
      [](const Dtype& dtype) { return Dtype{fr::packed_conv_weight_dtype(dtype.name)}; },
      py::arg("dtype"), "Dtype of what pack_conv_weight returns for a weight of this dtype.");
  m.def(
      "conv_algorithm",
      [](const fr::Ints& input_shape, const fr::Ints& weight_shape, const fr::Ints& stride,
         const fr::Ints& padding, const fr::Ints& dilation, int64_t groups, const Dtype& dtype,
         bool winograd) {
        return fr::conv_algorithm_name(input_shape, weight_shape, stride, padding, dilation, groups,
                                       dtype.name, winograd);
      },
      py::arg("input_shape"), py::arg("weight_shape"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups"), py::arg("dtype"), py::arg("winograd"),
      "The algorithm that conv_bn_add_relu_packed runs on the CPU.");
  m.def(
      "peak_flops", [](const Dtype& dtype) { return fr::measured_peak_flops(dtype.name); },
      py::arg("dtype"),
      "Measured floating-point operations per second of the CPU, on PyTorch's threads.");
  m.def("memory_bandwidth", &fr::measured_memory_bandwidth,
        "Measured memory bandwidth in bytes per second, on PyTorch's threads: read and copy.");
  m.def("release_results", &fr::release_results,
        "Returns the unused memory that is cached for results on the CPU to the system.");
  m.def("kept_result_bytes", &fr::kept_result_bytes,
        "Bytes of unused memory that are cached for results on the CPU.");
  m.def(
      "program_report",
      [](const std::vector<AnyTensor>& tensors, const fr::Ints& steps, const fr::Ints& outputs,
         const fr::Ints& sizes, const Dtype& dtype) {
        py::list list;
        for (const AnyTensor& t : tensors) list.append(t.object);
        const Number program(list, py::cast(steps), py::cast(outputs));
        return fr::report_program(program.get(), sizes, dtype.name);
      },
      py::arg("tensors"), py::arg("steps"), py::arg("outputs"), py::arg("sizes"), py::arg("dtype"),
      "What run_program would run on the CPU for an x of these sizes and dtype: for each step the "
      "shape of its result, the algorithm of its convolution, and the images of a micro-batch.");
  py::class_<Program>(m, "Program", "run_program with all arguments bound but x.")
      .def(py::init<const std::vector<AnyTensor>&, const fr::Ints&, const fr::Ints&>(),
           py::arg("tensors"), py::arg("steps"), py::arg("outputs"))
      .def(
          "__call__",
          [](const py::object& self, const AnyTensor& x) {
            return initialized<Program>(self)(x.object);
          },
          py::arg("x"));
  // The operators themselves, through the dispatcher, without the checks of
  // fused_resnet/ops/checks.py.
  const py::object ops = py::module_::import("torch").attr("ops").attr("fused_resnet");
  for (const std::string& schema : fr::schemas()) {
    const std::string name = schema.substr(0, schema.find('('));
    m.attr(name.c_str()) = ops.attr(name.c_str());
  }
}
