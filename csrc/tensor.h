// Tensors by LibTorch's stable C interface alone, so that one library runs with every PyTorch from
// the version on that it is compiled for. The names are those of at::Tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <optional>
#include <utility>
#include <vector>

#include "errors.h"

namespace fr {

using torch::headeronly::MemoryFormat;
constexpr MemoryFormat kContiguous = MemoryFormat::Contiguous;
constexpr MemoryFormat kChannelsLast = MemoryFormat::ChannelsLast;

// A device by PyTorch's own numbers.
struct Device {
  int32_t type, index;

  static Device cpu() { return {aoti_torch_device_type_cpu(), -1}; }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// What a tensor is allocated with.
struct Options {
  ScalarType type;
  Device device;

  Options dtype(ScalarType other) const { return {other, device}; }
};

int64_t element_size(ScalarType type);
bool is_floating_type(ScalarType type);

// A reference to a tensor, or none. Copies refer to the same tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& other);
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  // The reference goes to the caller.
  AtenTensorHandle release() && { return std::exchange(handle_, nullptr); }

  bool defined() const;
  int64_t dim() const;
  int64_t numel() const;
  int64_t size(int64_t dim) const { return sizes()[static_cast<size_t>(dim)]; }
  int64_t stride(int64_t dim) const { return strides()[static_cast<size_t>(dim)]; }
  IntArrayRef sizes() const;
  IntArrayRef strides() const;
  int64_t storage_offset() const;
  size_t storage_nbytes() const;
  ScalarType scalar_type() const;
  Device device() const;
  Layout layout() const;
  Options options() const { return {scalar_type(), device()}; }
  int64_t element_size() const { return fr::element_size(scalar_type()); }
  int64_t nbytes() const { return numel() * element_size(); }

  bool is_contiguous(MemoryFormat format = kContiguous) const;
  bool is_non_overlapping_and_dense() const;
  MemoryFormat suggest_memory_format() const;

  const void* const_data_ptr() const;
  void* mutable_data_ptr() const;
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

  // This tensor where nothing is to be done.
  Tensor contiguous(MemoryFormat format = kContiguous) const;
  Tensor to(ScalarType type) const;

  Tensor clone(MemoryFormat format) const;
  const Tensor& copy_(const Tensor& source) const;
  const Tensor& zero_() const;

 private:
  AtenTensorHandle handle_ = nullptr;
};

using OptionalTensor = std::optional<Tensor>;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

inline std::vector<int64_t> to_vector(IntArrayRef ints) { return {ints.begin(), ints.end()}; }

// The strides of a tensor that is dense in this format, as PyTorch has them.
std::vector<int64_t> dense_strides(IntArrayRef sizes, MemoryFormat format);

// Uninitialised.
Tensor empty(IntArrayRef sizes, const Options& options, MemoryFormat format = kContiguous);
Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, const Options& options);
inline Tensor empty(IntArrayRef sizes, ScalarType type) {
  return empty(sizes, {type, Device::cpu()});
}
// With the strides that PyTorch's empty_like gives it.
Tensor empty_like(const Tensor& like);
Tensor zeros(IntArrayRef sizes, const Options& options);
inline Tensor zeros(IntArrayRef sizes, ScalarType type) {
  return zeros(sizes, {type, Device::cpu()});
}

// A tensor in memory on the CPU that others own: free_memory(memory, context) once no tensor uses
// it. It cannot grow.
Tensor from_memory(void* memory, IntArrayRef sizes, IntArrayRef strides, ScalarType type,
                   void (*free_memory)(void* memory, void* context), void* context);

// PyTorch's operators, without autograd.
Tensor convolution(const Tensor& input, const Tensor& weight, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups);
struct ConvolutionGradients {
  Tensor input, weight;
};
ConvolutionGradients convolution_backward(const Tensor& gradient, const Tensor& input,
                                          const Tensor& weight, IntArrayRef stride,
                                          IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                          bool need_input, bool need_weight);
Tensor max_pool2d(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding);
Tensor permute(const Tensor& x, IntArrayRef dims);
Tensor view(const Tensor& x, IntArrayRef sizes);
// Over one dimension.
Tensor sum(const Tensor& x, int64_t dim);

}  // namespace fr
