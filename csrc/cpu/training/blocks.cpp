#include "blocks.h"

#include "../../tensor.h"
#include "../folding.h"

namespace fr {
namespace {

// Additions that are worth a thread.
constexpr int64_t kGrain = 32 * 1024;

// Calls run(begin, end) for ranges of channels, from several threads.
template <class Run>
void for_channels(int64_t channels, int64_t terms, const Run& run) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(terms, 1), 16);
  parallel_for(0, channels, grain, run);
}

}  // namespace

Tensor PartialSums::total(int64_t row, ScalarType type) const {
  const double* from = reinterpret_cast<const double*>(data_) + row * channels_;
  std::vector<double> sums(static_cast<size_t>(channels_), 0.0);
  for_channels(channels_, blocks_, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < blocks_; ++b) {
      const double* part = from + b * rows_ * channels_;
      for (int64_t c = begin; c < end; ++c) sums[c] += part[c];
    }
  });
  return as_tensor(sums, type);
}

std::tuple<Tensor, Tensor> PartialSums::merge(const std::vector<double>& sizes,
                                              ScalarType type) const {
  const double* from = reinterpret_cast<const double*>(data_);
  std::vector<double> mean(static_cast<size_t>(channels_), 0.0), m2 = mean;
  double count = 0;
  for (const double size : sizes) count += size;
  for_channels(channels_, blocks_ * 2, [&](int64_t begin, int64_t end) {
    double before = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const double size = sizes[b], share = size / (before + size), both = before * share;
      const double* part = from + b * rows_ * channels_;
      const double *pivot = part + kPivot * channels_, *sum = part + kSumFromPivot * channels_,
                   *squares = part + kSquaresFromPivot * channels_;
      for (int64_t c = begin; c < end; ++c) {
        const double from_pivot = sum[c] / size;
        const double delta = pivot[c] + from_pivot - mean[c];
        mean[c] += delta * share;
        m2[c] += squares[c] - sum[c] * from_pivot + delta * delta * both;
      }
      before += size;
    }
  });
  // A sum of squares less another one may be below zero by a rounding.
  for (double& v : m2) v = count > 0 ? std::max(v / count, 0.0) : 0.0;
  return {as_tensor(mean, type), as_tensor(m2, type)};
}

}  // namespace fr
