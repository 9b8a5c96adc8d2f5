// The arguments of residual_segment but x, stored in the types that the dispatcher takes:
// converting three Python lists of 18 tensors at every call would cost 8 us.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>
#include <vector>

namespace fr {

class ResidualSegment {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Ints = std::vector<int64_t>;

  // The operator's arguments after x.
  ResidualSegment(Tensors packed, Tensors scale, Tensors shift, Ints convs,
                  const std::vector<bool>& projected, Ints padding, Ints stride, Ints dilation,
                  Ints groups, const std::vector<bool>& winograd)
      : packed_(std::move(packed)),
        scale_(std::move(scale)),
        shift_(std::move(shift)),
        convs_(std::move(convs)),
        padding_(std::move(padding)),
        stride_(std::move(stride)),
        dilation_(std::move(dilation)),
        groups_(std::move(groups)) {
    for (const bool is : projected) projected_.push_back(is);
    for (const bool may : winograd) winograd_.push_back(may);
  }

  at::Tensor operator()(const at::Tensor& x) const {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fused_resnet::residual_segment", "")
            .typed<at::Tensor(const at::Tensor&, at::TensorList, at::TensorList, at::TensorList,
                              at::IntArrayRef, const c10::List<bool>&, at::IntArrayRef,
                              at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                              const c10::List<bool>&)>();
    return op.call(x, packed_, scale_, shift_, convs_, projected_, padding_, stride_, dilation_,
                   groups_, winograd_);
  }

 private:
  Tensors packed_, scale_, shift_;
  Ints convs_, padding_, stride_, dilation_, groups_;
  c10::List<bool> projected_, winograd_;
};

}  // namespace fr
