// PyTorch's own convolution, for geometries, dtypes and instruction sets without a kernel here.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

namespace fr {

// Inside of an operator autograd and autocast have had their turn.
class BelowAutograd {
 private:
  at::AutoDispatchBelowADInplaceOrView below_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace fr
