// Keeps the tensors that a call reads alive until it is launched.
#pragma once

#include <optional>
#include <vector>

#include "../../tensor.h"

namespace fr {

class Operands {
 public:
  const Tensor& keep(const Tensor& t) {
    kept_.push_back(t);
    return kept_.back();
  }

  // One float32 number per channel, or null for None.
  const float* floats(const OptionalTensor& v) {
    return v ? keep(v->to(ScalarType::Float).contiguous()).const_data_ptr<float>() : nullptr;
  }

 private:
  std::vector<Tensor> kept_;
};

}  // namespace fr
