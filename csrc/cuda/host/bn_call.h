// Shared by the operators that traverse maps channel by channel: the maps of a call, the plan of
// their traversal, and the launches.
#pragma once

#include <cstdint>

#include "../../checks.h"
#include "../../tensor.h"
#include "../bn_add_relu.h"
#include "context.h"
#include "operands.h"

namespace fr {

// Raises a TypeError for float64.
Storage storage_of(const char* op, const Tensor& x);

// The maps of a call, all in one memory format, and the plan of their traversal.
class BnCall {
 public:
  // Maps are in the format of x, or in one that is given.
  BnCall(const char* op, const Tensor& x) : BnCall(op, x, x.suggest_memory_format()) {}
  BnCall(const char* op, const Tensor& x, MemoryFormat format);

  const void* input(const Tensor& t) { return align(operands_.keep(t.contiguous(format_))); }
  void* result(Tensor& t) {
    t = device_empty(x_.sizes(), x_.options(), format_);
    align(t);
    return t.mutable_data_ptr();
  }
  const float* vector(const OptionalTensor& v) { return operands_.floats(v); }
  // Memory that lives until the call ends.
  float* scratch(int64_t size) { return operands_.keep(floats(size)).mutable_data_ptr<float>(); }
  Tensor floats(int64_t size) const {
    return device_empty({size}, x_.options().dtype(ScalarType::Float));
  }

  // To be called after input() and result() for all maps.
  BnMap plan();

  template <class Params>
  void launch(cudaError_t (*kernel)(const Params&, Storage, bool, cudaStream_t),
              const Params& params) const {
    check_launch(op_, kernel(params, storage_, by_packs_, scope_.stream()));
  }
  template <class Params>
  void launch(cudaError_t (*kernel)(const Params&, cudaStream_t), const Params& params) const {
    check_launch(op_, kernel(params, scope_.stream()));
  }

 private:
  const void* align(const Tensor& t) {
    aligned_ = aligned_ && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    return t.const_data_ptr();
  }

  const char* op_;
  Tensor x_;
  Operands operands_;
  DeviceScope scope_;
  Storage storage_;
  MemoryFormat format_;
  bool aligned_ = true, by_packs_ = false;
};

}  // namespace fr
