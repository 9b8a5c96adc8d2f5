#include "bn_call.h"

#include <limits>

namespace fr {

Storage storage_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Half:
      return Storage::kFloat16;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      FR_CHECK_TYPE(false, op, ": x: expected dtype float32, bfloat16 or float16 on ", x.device(),
                    ", got ", x.scalar_type());
  }
}

BnCall::BnCall(const char* op, const Tensor& x, MemoryFormat format)
    : op_(op), x_(x), scope_(x), storage_(storage_of(op, x)), format_(format) {
  FR_CHECK_VALUE(x.size(0) * x.size(2) * x.size(3) < (1 << 30), op,
                 ": x: expected less than 2^30 pixels in a batch, got ", x.sizes());
  FR_CHECK_VALUE(x.size(1) <= std::numeric_limits<int>::max() - 256, op,
                 ": x: expected less channels, got ", x.size(1));
}

BnMap BnCall::plan() {
  const int64_t channels = x_.size(1), plane = x_.size(2) * x_.size(3);
  // With one channel or one pixel both formats are the same memory: take the one with longer rows.
  const bool last = format_ == kChannelsLast ? channels > 1 : plane == 1;
  by_packs_ = aligned_ && (last ? channels : plane) % (16 / storage_bytes(storage_)) == 0;
  return plan_bn(x_.size(0), channels, plane, last, storage_, by_packs_, scope_.multiprocessors());
}

}  // namespace fr
