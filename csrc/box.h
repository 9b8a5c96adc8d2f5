// Turns a function into the kernel that LibTorch's stable interface registers: one that takes its
// arguments from an array of 64-bit values and stores its results there.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "activation.h"
#include "errors.h"
#include "tensor.h"
#include "wire.h"

namespace fr {

// What owns an argument while the function runs.
template <class T>
struct Argument {
  T value;
  explicit Argument(StableIValue wire) : value(from_wire<T>(wire)) {}
};

template <>
struct Argument<Tensor> {
  Tensor value;
  explicit Argument(StableIValue wire) : value(from_wire<AtenTensorHandle>(wire)) {}
};

template <>
struct Argument<OptionalTensor> {
  OptionalTensor value;
  explicit Argument(StableIValue wire) {
    if (const auto handle = from_wire<std::optional<AtenTensorHandle>>(wire))
      value.emplace(*handle);
  }
};

template <>
struct Argument<TensorList> {
  std::vector<Tensor> value;
  explicit Argument(StableIValue wire) {
    for (const AtenTensorHandle handle : from_wire<std::vector<AtenTensorHandle>>(wire))
      value.emplace_back(handle);
  }
};

template <>
struct Argument<Activation> {
  Activation value;
  explicit Argument(StableIValue wire) {
    const auto number = from_wire<int64_t>(wire);
    FR_CHECK_VALUE(number >= 0 && number < kNumActivations,
                   "activation: expected an int from 0 to ", kNumActivations - 1, ", got ", number);
    value = static_cast<Activation>(number);
  }
};

template <>
struct Argument<IntArrayRef> {
  std::vector<int64_t> value;
  explicit Argument(StableIValue wire) : value(from_wire<std::vector<int64_t>>(wire)) {}
};

inline StableIValue result_of(Tensor&& t) { return to_wire(std::move(t).release()); }
inline StableIValue result_of(int64_t number) { return to_wire(number); }
inline StableIValue result_of(std::vector<Tensor>&& tensors) {
  std::vector<AtenTensorHandle> handles;
  handles.reserve(tensors.size());
  for (Tensor& t : tensors) handles.push_back(std::move(t).release());
  return to_wire(handles);
}

template <class... T, size_t... I>
void put(StableIValue* stack, std::tuple<T...>&& results, std::index_sequence<I...>) {
  ((stack[I] = result_of(std::move(std::get<I>(results)))), ...);
}
template <class... T>
void put(StableIValue* stack, std::tuple<T...>&& results) {
  put(stack, std::move(results), std::index_sequence_for<T...>());
}
template <class T>
void put(StableIValue* stack, T&& result) {
  stack[0] = result_of(std::forward<T>(result));
}

template <auto function>
struct Box;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Box<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    run(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... I>
  static void run(StableIValue* stack, std::index_sequence<I...>) {
    // Braces evaluate in order.
    std::tuple<Argument<std::decay_t<Arguments>>...> owned{
        Argument<std::decay_t<Arguments>>(stack[I])...};
    if constexpr (std::is_void_v<Result>) {
      function(std::get<I>(owned).value...);
    } else {
      put(stack, function(std::get<I>(owned).value...));
    }
  }
};

}  // namespace fr

#define FR_BOX(function) ::fr::Box<&function>::call
