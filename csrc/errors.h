// Errors of the operators, and what turns them into Python's.
//
// LibTorch's stable interface has no error but std::runtime_error, which Python sees as a
// RuntimeError. PyTorch's bindings make a ValueError of std::invalid_argument. No C++ exception is
// a TypeError to them, so the Python module says how one is thrown.
#pragma once

#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <string>

namespace fr {

using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::Layout;
using torch::headeronly::ScalarType;

struct Device;

// What messages are made of: strings, numbers, sizes as "[2, 3]", dtypes as "Float", devices as
// "cuda:0".
void append(std::string& text, const char* part);
void append(std::string& text, const std::string& part);
void append(std::string& text, int64_t part);
void append(std::string& text, IntArrayRef part);
void append(std::string& text, ScalarType part);
void append(std::string& text, Layout part);
void append(std::string& text, const Device& part);
inline void append(std::string& text, int part) { append(text, static_cast<int64_t>(part)); }
inline void append(std::string& text, size_t part) { append(text, std::to_string(part)); }

template <class... Parts>
std::string message(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

[[noreturn]] void throw_value_error(const std::string& text);
[[noreturn]] void throw_type_error(const std::string& text);
[[noreturn]] void throw_runtime_error(const std::string& text);

// Throws a TypeError with this text. Without a Python module there is none: a type error is then
// what a value error is.
using ThrowTypeError = void (*)(const char* text);
void set_throw_type_error(ThrowTypeError function);

}  // namespace fr

#define FR_CHECK_VALUE(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::fr::throw_value_error(::fr::message(__VA_ARGS__))
#define FR_CHECK_TYPE(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::fr::throw_type_error(::fr::message(__VA_ARGS__))
#define FR_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::fr::throw_runtime_error(::fr::message(__VA_ARGS__))
