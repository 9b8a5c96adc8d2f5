#include "errors.h"

#include <atomic>
#include <stdexcept>

#include "tensor.h"

namespace fr {
namespace {

std::atomic<ThrowTypeError> type_error{nullptr};

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::Strided:
      return "Strided";
    case Layout::Sparse:
      return "Sparse";
    case Layout::SparseCsr:
      return "SparseCsr";
    case Layout::SparseCsc:
      return "SparseCsc";
    case Layout::SparseBsr:
      return "SparseBsr";
    case Layout::SparseBsc:
      return "SparseBsc";
    case Layout::Mkldnn:
      return "Mkldnn";
    case Layout::Jagged:
      return "Jagged";
    default:
      return "another layout";
  }
}

const char* name_of_device(int32_t type) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda";
  if (type == aoti_torch_device_type_meta()) return "meta";
  if (type == aoti_torch_device_type_xpu()) return "xpu";
  if (type == aoti_torch_device_type_mps()) return "mps";
  return "another device";
}

}  // namespace

void append(std::string& text, const char* part) { text += part; }
void append(std::string& text, const std::string& part) { text += part; }
void append(std::string& text, int64_t part) { text += std::to_string(part); }

void append(std::string& text, IntArrayRef part) {
  text += '[';
  for (size_t i = 0; i < part.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(part[i]);
  }
  text += ']';
}

void append(std::string& text, ScalarType part) { text += torch::headeronly::toString(part); }
void append(std::string& text, Layout part) { text += name_of(part); }

void append(std::string& text, const Device& part) {
  text += name_of_device(part.type);
  if (part.index >= 0) text += ':' + std::to_string(part.index);
}

void throw_value_error(const std::string& text) { throw std::invalid_argument(text); }

void throw_type_error(const std::string& text) {
  if (const ThrowTypeError function = type_error) function(text.c_str());
  throw std::invalid_argument(text);
}

void throw_runtime_error(const std::string& text) { throw std::runtime_error(text); }

void set_throw_type_error(ThrowTypeError function) { type_error = function; }

}  // namespace fr
