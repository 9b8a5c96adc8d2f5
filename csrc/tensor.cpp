#include "tensor.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "wire.h"

namespace fr {
namespace {

// Throws where PyTorch has raised an error behind its C interface. Its text is kept from 2.13 on;
// before that PyTorch prints it.
void check(AOTITorchError error, const char* what) {
  if (__builtin_expect(error == AOTI_TORCH_SUCCESS, 1)) return;
  using Text = const char* (*)();
  static const auto text =
      reinterpret_cast<Text>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* const reason = text == nullptr ? nullptr : text();
  throw_runtime_error(reason == nullptr ? message("fused_resnet: PyTorch's ", what, " failed")
                                        : std::string(reason));
}

// PyTorch's numbers of the dtypes that have kernels here.
struct TypeNumbers {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
};

const TypeNumbers& type_numbers() {
  static const TypeNumbers numbers;
  return numbers;
}

int32_t number_of(ScalarType type) { return from_wire<int32_t>(to_wire(type)); }

// While this exists autograd records nothing. Autocast leaves the operators alone that are called
// below: they are not in its lists.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  const bool before_;
};

StableIValue reference(const Tensor& t) { return to_wire(Tensor(t).release()); }

template <size_t N>
void call(const char* name, const char* overload, std::array<StableIValue, N>& stack) {
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
}

template <size_t N>
Tensor call_one(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  call(name, overload, stack);
  return Tensor(from_wire<AtenTensorHandle>(stack[0]));
}

}  // namespace

int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return static_cast<int64_t>(aoti_torch_dtype_element_size(number_of(type)));
  }
}

bool is_floating_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e8m0fnu:
    case ScalarType::Float4_e2m1fn_x2:
      return true;
    default:
      return false;
  }
}

Tensor::Tensor(const Tensor& other) {
  if (other.handle_ != nullptr)
    check(aoti_torch_new_tensor_handle(other.handle_, &handle_), "tensor reference");
}

bool Tensor::defined() const {
  bool result = false;
  if (handle_ != nullptr) check(aoti_torch_is_defined(handle_, &result), "is_defined");
  return result;
}

int64_t Tensor::dim() const {
  int64_t result = 0;
  check(aoti_torch_get_dim(handle_, &result), "dim");
  return result;
}

int64_t Tensor::numel() const {
  int64_t result = 0;
  check(aoti_torch_get_numel(handle_, &result), "numel");
  return result;
}

IntArrayRef Tensor::sizes() const {
  int64_t* result = nullptr;
  check(aoti_torch_get_sizes(handle_, &result), "sizes");
  return {result, static_cast<size_t>(dim())};
}

IntArrayRef Tensor::strides() const {
  int64_t* result = nullptr;
  check(aoti_torch_get_strides(handle_, &result), "strides");
  return {result, static_cast<size_t>(dim())};
}

int64_t Tensor::storage_offset() const {
  int64_t result = 0;
  check(aoti_torch_get_storage_offset(handle_, &result), "storage_offset");
  return result;
}

size_t Tensor::storage_nbytes() const {
  int64_t result = 0;
  check(aoti_torch_get_storage_size(handle_, &result), "storage size");
  return static_cast<size_t>(result);
}

ScalarType Tensor::scalar_type() const {
  int32_t number = 0;
  check(aoti_torch_get_dtype(handle_, &number), "dtype");
  const TypeNumbers& numbers = type_numbers();
  if (number == numbers.float32) return ScalarType::Float;
  if (number == numbers.float64) return ScalarType::Double;
  if (number == numbers.bfloat16) return ScalarType::BFloat16;
  if (number == numbers.float16) return ScalarType::Half;
  return from_wire<ScalarType>(to_wire(number));
}

Device Tensor::device() const {
  Device result{};
  check(aoti_torch_get_device_type(handle_, &result.type), "device");
  check(aoti_torch_get_device_index(handle_, &result.index), "device");
  return result;
}

Layout Tensor::layout() const {
  int32_t number = 0;
  check(aoti_torch_get_layout(handle_, &number), "layout");
  return number == aoti_torch_layout_strided() ? Layout::Strided
                                               : from_wire<Layout>(to_wire(number));
}

bool Tensor::is_contiguous(MemoryFormat format) const {
  if (format == kContiguous) {
    bool result = false;
    check(aoti_torch_is_contiguous(handle_, &result), "is_contiguous");
    return result;
  }
  const IntArrayRef size = sizes(), step = strides();
  if (size.size() != 4) return false;
  int64_t expected = 1;
  for (const size_t d : {1, 3, 2, 0}) {
    if (size[d] == 1) continue;
    if (step[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

bool Tensor::is_non_overlapping_and_dense() const {
  const IntArrayRef size = sizes(), step = strides();
  std::vector<size_t> order;
  for (size_t d = 0; d < size.size(); ++d) {
    if (size[d] == 0) return true;
    if (size[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return step[a] < step[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (step[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// PyTorch's rule: a map without a channel, a pixel or an image that the strides tell apart from a
// contiguous one is contiguous.
MemoryFormat Tensor::suggest_memory_format() const {
  const IntArrayRef size = sizes(), step = strides();
  if (size.size() != 4 || step[1] == 0) return kContiguous;
  int64_t least = 0;
  for (const size_t d : {1, 3, 2, 0}) {
    if (size[d] == 0 || step[d] < least || (d == 0 && least == step[1])) return kContiguous;
    least = step[d] * std::max<int64_t>(size[d], 1);
  }
  return kChannelsLast;
}

const void* Tensor::const_data_ptr() const {
  const void* result = nullptr;
  check(torch_get_const_data_ptr(handle_, &result), "const_data_ptr");
  return result;
}

void* Tensor::mutable_data_ptr() const {
  void* result = nullptr;
  check(torch_get_mutable_data_ptr(handle_, &result), "mutable_data_ptr");
  return result;
}

Tensor Tensor::contiguous(MemoryFormat format) const {
  if (is_contiguous(format)) return *this;
  return call_one("aten::contiguous", "", std::array{reference(*this), to_wire(format)});
}

Tensor Tensor::to(ScalarType type) const {
  if (scalar_type() == type) return *this;
  return call_one("aten::to", "dtype",
                  std::array{reference(*this), to_wire(type), to_wire(false), to_wire(false),
                             to_wire(std::optional<MemoryFormat>())});
}

Tensor Tensor::clone(MemoryFormat format) const {
  return call_one("aten::clone", "", std::array{reference(*this), to_wire(std::optional(format))});
}

const Tensor& Tensor::copy_(const Tensor& source) const {
  check(aoti_torch_copy_(handle_, source.handle_, 0), "copy_");
  return *this;
}

const Tensor& Tensor::zero_() const {
  check(aoti_torch_zero_(handle_), "zero_");
  return *this;
}

std::vector<int64_t> dense_strides(IntArrayRef sizes, MemoryFormat format) {
  std::vector<int64_t> strides(sizes.size(), 1);
  if (format == kChannelsLast) {
    strides[3] = sizes[1];
    strides[2] = strides[3] * sizes[3];
    strides[0] = strides[2] * sizes[2];
    return strides;
  }
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, const Options& options) {
  AtenTensorHandle result = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 number_of(options.type), options.device.type, options.device.index,
                                 &result),
        "empty_strided");
  return Tensor(result);
}

Tensor empty(IntArrayRef sizes, const Options& options, MemoryFormat format) {
  return empty_strided(sizes, dense_strides(sizes, format), options);
}

Tensor empty_like(const Tensor& like) {
  if (like.is_non_overlapping_and_dense())
    return empty_strided(like.sizes(), like.strides(), like.options());
  return call_one(
      "aten::empty_like", "",
      std::array{reference(like), to_wire(std::optional<ScalarType>()),
                 to_wire(std::optional<Layout>()), to_wire(std::nullopt),
                 to_wire(std::optional<bool>()), to_wire(std::optional<MemoryFormat>())});
}

Tensor zeros(IntArrayRef sizes, const Options& options) {
  Tensor result = empty(sizes, options);
  result.zero_();
  return result;
}

Tensor from_memory(void* memory, IntArrayRef sizes, IntArrayRef strides, ScalarType type,
                   void (*free_memory)(void*, void*), void* context) {
  AtenTensorHandle result = nullptr;
  check(torch_from_blob(memory, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                        number_of(type), aoti_torch_device_type_cpu(), -1, &result,
                        aoti_torch_layout_strided(), nullptr, 0, free_memory, context),
        "from_blob");
  return Tensor(result);
}

Tensor convolution(const Tensor& input, const Tensor& weight, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const NoGrad guard;
  const std::array<int64_t, 2> none{0, 0};
  return call_one("aten::convolution", "",
                  std::array{reference(input), reference(weight), to_wire(std::nullopt),
                             to_wire(stride), to_wire(padding), to_wire(dilation), to_wire(false),
                             to_wire(IntArrayRef(none)), to_wire(groups)});
}

ConvolutionGradients convolution_backward(const Tensor& gradient, const Tensor& input,
                                          const Tensor& weight, IntArrayRef stride,
                                          IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                          bool need_input, bool need_weight) {
  const NoGrad guard;
  const std::array<int64_t, 2> none{0, 0};
  const std::array<bool, 3> mask{need_input, need_weight, false};
  std::array stack{reference(gradient),
                   reference(input),
                   reference(weight),
                   to_wire(std::nullopt),
                   to_wire(stride),
                   to_wire(padding),
                   to_wire(dilation),
                   to_wire(false),
                   to_wire(IntArrayRef(none)),
                   to_wire(groups),
                   to_wire(torch::headeronly::HeaderOnlyArrayRef<bool>(mask))};
  call("aten::convolution_backward", "", stack);
  const Tensor bias(from_wire<AtenTensorHandle>(stack[2]));  // not asked for, but a reference
  return {Tensor(from_wire<AtenTensorHandle>(stack[0])),
          Tensor(from_wire<AtenTensorHandle>(stack[1]))};
}

Tensor max_pool2d(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  const NoGrad guard;
  const std::array<int64_t, 2> one{1, 1};
  return call_one("aten::max_pool2d", "",
                  std::array{reference(x), to_wire(kernel), to_wire(stride), to_wire(padding),
                             to_wire(IntArrayRef(one)), to_wire(false)});
}

Tensor permute(const Tensor& x, IntArrayRef dims) {
  return call_one("aten::permute", "", std::array{reference(x), to_wire(dims)});
}

Tensor view(const Tensor& x, IntArrayRef sizes) {
  return call_one("aten::view", "", std::array{reference(x), to_wire(sizes)});
}

Tensor sum(const Tensor& x, int64_t dim) {
  return call_one("aten::sum", "dim_IntList",
                  std::array{reference(x), to_wire(std::optional(IntArrayRef(dim))), to_wire(false),
                             to_wire(std::optional<ScalarType>())});
}

}  // namespace fr
