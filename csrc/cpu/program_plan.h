// How a program runs on a batch of a given size: which steps go through the batch together in
// micro-batches, where each value lies, and which algorithm each convolution takes.
#pragma once

#include <vector>

#include "conv_driver.h"
#include "program_check.h"

namespace fr {

// The last step that reads each value; the step that makes it if none does.
std::vector<int64_t> last_reads(const CheckedProgram& program);

// The steps [first, end), which a micro-batch goes through before the next one begins.
struct Run {
  int64_t first, end;
  int64_t micro_batches;  // their sizes differ by one image at most

  int64_t most_images(int64_t batch) const { return (batch + micro_batches - 1) / micro_batches; }
};

// Cuts a program into runs, for the cache's sake only: no result depends on them.
std::vector<Run> choose_runs(const CheckedProgram& program, int64_t threads);

// Where a value lies. The bases are x, the arena, and the outputs in their order.
struct Place {
  static constexpr int64_t kX = 0, kArena = 1, kFirstOutput = 2;

  int64_t base = kArena;
  int64_t offset = 0;  // bytes
  bool whole = false;  // all images of the batch, or those of a micro-batch
};

struct ProgramPlan {
  CheckedProgram program;
  std::vector<Run> runs;
  std::vector<Place> places;
  std::vector<ConvAlgorithm> algorithms;  // of each step
  int64_t arena_bytes = 0;
};

ProgramPlan make_plan(CheckedProgram program, int64_t threads);

}  // namespace fr
