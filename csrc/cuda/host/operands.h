// Keeps the tensors that a call reads alive until it is launched.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fr {

using OptionalTensor = std::optional<at::Tensor>;
constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

class Operands {
 public:
  const at::Tensor& keep(const at::Tensor& t) {
    kept_.push_back(t);
    return kept_.back();
  }

  // One float32 number per channel, or null for None.
  const float* floats(const OptionalTensor& v) {
    return v ? keep(v->to(at::kFloat).contiguous()).const_data_ptr<float>() : nullptr;
  }

 private:
  std::vector<at::Tensor> kept_;
};

}  // namespace fr
