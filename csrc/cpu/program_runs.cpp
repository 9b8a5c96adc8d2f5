// The choice of micro-batches, by a model of the bytes that pass between the caches and memory.
//
// A run of steps takes as many images at a time as have maps that fit the cache. Between two runs
// the values that are still needed are stored for the whole batch: written to memory, and read
// again. Within a run nothing is, but its weights are read once for each micro-batch, and small
// micro-batches leave threads waiting. The cut with the fewest bytes is found by dynamic
// programming over the borders between steps.
//
//   ResNet-50 at 224x224, batch 16: the maps of stage 1 have 3.2 MB an image and weights of 0.9 MB,
//   those of stage 4 0.4 MB and 60 MB.
#include <algorithm>
#include <limits>

#include "program_plan.h"

namespace fr {
namespace {

// Bytes of maps in one micro-batch, unless one image has more: half of an L3 cache of 32 MiB, which
// leaves room for the weights.
constexpr double kMicroBatchBytes = 16 * 1024 * 1024;

// Bytes of weights that stay in the cache from one micro-batch to the next.
constexpr double kCachedWeightBytes = 8 * 1024 * 1024;

// The cost of a step for one micro-batch, in bytes: its loop begins and ends, and threads wait.
constexpr double kStepBytes = 64 * 1024;

}  // namespace

std::vector<int64_t> last_reads(const CheckedProgram& program) {
  std::vector<int64_t> last(program.values.size(), 0);
  for (size_t v = 1; v < last.size(); ++v) last[v] = static_cast<int64_t>(v) - 1;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    last[static_cast<size_t>(step.input)] = static_cast<int64_t>(i);
    if (step.residual >= 0) last[static_cast<size_t>(step.residual)] = static_cast<int64_t>(i);
  }
  return last;
}

std::vector<Run> choose_runs(const CheckedProgram& program, int64_t threads) {
  const auto steps = static_cast<int64_t>(program.steps.size());
  const int64_t batch = program.values[0].n;
  const int64_t least = std::clamp<int64_t>(threads, 1, std::max<int64_t>(batch, 1));
  const std::vector<int64_t> last = last_reads(program);

  // Bytes of an image's values that a step has in the cache, and that cross the border before it.
  std::vector<double> live(static_cast<size_t>(steps), 0), border(static_cast<size_t>(steps), 0);
  for (size_t v = 0; v < last.size(); ++v) {
    const auto bytes = static_cast<double>(program.image_bytes(static_cast<int64_t>(v)));
    const int64_t made = static_cast<int64_t>(v) - 1;
    for (int64_t i = std::max<int64_t>(made, 0); i <= last[v]; ++i) {
      live[static_cast<size_t>(i)] += bytes;
      if (i > made && v > 0) border[static_cast<size_t>(i)] += bytes;
    }
  }
  for (int64_t i = 0; i < steps; ++i) {
    // A result that takes the place of its residual.
    const Step& step = program.steps[static_cast<size_t>(i)];
    if (step.residual > 0 && last[static_cast<size_t>(step.residual)] == i)
      live[static_cast<size_t>(i)] -= static_cast<double>(program.image_bytes(step.residual));
  }

  // The cheapest cut of the first `end` steps.
  struct Cut {
    double cost;
    Run run;  // the last one
  };
  std::vector<Cut> best(static_cast<size_t>(steps) + 1,
                        {std::numeric_limits<double>::infinity(), {}});
  best[0].cost = 0;
  for (int64_t first = 0; first < steps; ++first) {
    const double far = static_cast<double>(batch) * border[first] - kMicroBatchBytes / 2;
    const double begun = best[first].cost + 3 * std::max(far, 0.0);
    double most = 1, weights = 0;
    for (int64_t end = first + 1; end <= steps; ++end) {
      most = std::max(most, live[end - 1]);
      weights += static_cast<double>(program.steps[static_cast<size_t>(end - 1)].weight_bytes);
      const int64_t fit = std::max(static_cast<int64_t>(kMicroBatchBytes / most), least);
      const int64_t micro_batches = (batch + fit - 1) / fit;
      const double cost = begun + (weights > kCachedWeightBytes ? micro_batches : 1) * weights +
                          static_cast<double>(micro_batches * (end - first)) * kStepBytes;
      if (cost < best[end].cost) best[end] = {cost, {first, end, micro_batches}};
    }
  }

  std::vector<Run> runs;
  for (int64_t end = steps; end > 0; end = runs.back().first) runs.push_back(best[end].run);
  std::reverse(runs.begin(), runs.end());
  return runs;
}

}  // namespace fr
