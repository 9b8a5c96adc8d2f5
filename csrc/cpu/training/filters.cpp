#include "filters.h"

#include "../../parallel.h"
#include "../isa.h"
#include "../result_cache.h"

namespace fr {
namespace {

// Between two tensors of one shape, of which `from` has `rows` by `columns` in each filter.
void run_copy(const Tensor& from, const Tensor& to, int64_t rows, int64_t columns,
              ScalarType maps) {
  const FilterCopy copy{rows,
                        columns,
                        from.scalar_type() != maps,
                        to.scalar_type() != maps,
                        from.const_data_ptr(),
                        to.mutable_data_ptr()};
  const auto kernel = training_kernels().of[dtype_of(maps)].copy_filters;
  const int64_t grain = std::max<int64_t>(16 * 1024 / std::max<int64_t>(rows * columns, 1), 1);
  parallel_for(0, from.size(0), grain,
               [&](int64_t begin, int64_t end) { kernel(copy, begin, end); });
}

}  // namespace

Tensor filters_of(const Tensor& weight, ScalarType maps) {
  const bool taps_outside = weight.is_contiguous(kChannelsLast);
  if (taps_outside && weight.scalar_type() == maps) return weight;
  const Tensor source = taps_outside ? weight : weight.contiguous();
  const Tensor filters = empty_map(weight.sizes(), weight.options().dtype(maps));
  const int64_t channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (taps_outside) {
    run_copy(source, filters, 1, taps * channels, maps);
  } else {
    run_copy(source, filters, channels, taps, maps);
  }
  return filters;
}

void put_gradient(const Tensor& filters, const Tensor& gradient, ScalarType maps) {
  const int64_t channels = filters.size(1), taps = filters.size(2) * filters.size(3);
  if (gradient.is_contiguous(kChannelsLast)) {
    run_copy(filters, gradient, 1, taps * channels, maps);
  } else if (gradient.is_contiguous()) {
    run_copy(filters, gradient, taps, channels, maps);
  } else {
    gradient.copy_(filters);
  }
}

}  // namespace fr
