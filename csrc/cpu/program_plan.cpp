#include "program_plan.h"

#include <algorithm>
#include <numeric>

#include "../tensor.h"

namespace fr {
namespace {

// Rounds up to whole cache lines.
int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory for one value, or for several of which each takes the place of the one before.
struct Buffer {
  int64_t bytes_per_image;
  int64_t first, last;  // steps during which it is needed
  bool whole;
  int64_t output = -1;  // of the program; -1: in the arena
  int64_t offset = 0;
};

// Gives values their places.
class Arena {
 public:
  Arena(const CheckedProgram& program, const std::vector<Run>& runs)
      : program_(program), runs_(runs), last_(last_reads(program)) {
    for (size_t run = 0; run < runs.size(); ++run)
      run_of_.insert(run_of_.end(), static_cast<size_t>(runs[run].end - runs[run].first), run);
    outputs_.assign(program.values.size(), -1);
    for (size_t i = 0; i < program.outputs.size(); ++i)
      outputs_[static_cast<size_t>(program.outputs[i])] = static_cast<int64_t>(i);
    buffer_of_.assign(program.values.size(), 0);
    for (size_t value = 1; value < program.values.size(); ++value) add(value);
    arrange();
  }

  std::vector<Place> places() const {
    std::vector<Place> result{{Place::kX, 0, true}};
    for (size_t value = 1; value < buffer_of_.size(); ++value) {
      const Buffer& b = buffers_[buffer_of_[value]];
      result.push_back(b.output < 0 ? Place{Place::kArena, b.offset, b.whole}
                                    : Place{Place::kFirstOutput + b.output, 0, true});
    }
    return result;
  }

  int64_t bytes() const { return bytes_; }

 private:
  const CheckedProgram& program_;
  const std::vector<Run>& runs_;
  const std::vector<int64_t> last_;
  std::vector<size_t> run_of_;     // each step
  std::vector<int64_t> outputs_;   // index of each value among the outputs, or -1
  std::vector<size_t> buffer_of_;  // each value
  std::vector<Buffer> buffers_;
  int64_t bytes_ = 0;

  void add(size_t value) {
    const auto made = static_cast<int64_t>(value) - 1;
    const int64_t output = outputs_[value], last = last_[value];
    const bool crosses = run_of_[static_cast<size_t>(made)] != run_of_[static_cast<size_t>(last)];
    const Buffer own{program_.image_bytes(static_cast<int64_t>(value)), made, last,
                     output >= 0 || crosses, output};
    if (const int64_t residual = replaced(value, own); residual > 0) {
      const size_t at = buffer_of_[static_cast<size_t>(residual)];
      Buffer& shared = buffers_[at];
      shared.last = last;
      shared.whole = own.whole;
      shared.output = output;
      buffer_of_[value] = at;
    } else {
      buffer_of_[value] = buffers_.size();
      buffers_.push_back(own);
    }
  }

  // The residual whose memory the value may take; 0: none. The thread that writes an element of the
  // result is the only one in the step that reads that element of the residual, and it reads it
  // first.
  int64_t replaced(size_t value, const Buffer& own) const {
    const Step& step = program_.steps[value - 1];
    const int64_t residual = step.residual;
    if (residual <= 0 || residual == step.input) return 0;
    if (last_[static_cast<size_t>(residual)] != own.first) return 0;
    if (outputs_[static_cast<size_t>(residual)] >= 0) return 0;
    // A micro-batch's result would leave the cache for the sake of a residual that is read once.
    if (buffers_[buffer_of_[static_cast<size_t>(residual)]].whole && !own.whole) return 0;
    return residual;
  }

  // Places the largest buffers first, each at the least offset where no buffer lies that is needed
  // at the same time.
  void arrange() {
    for (Buffer& b : buffers_) {
      if (!b.whole) continue;
      b.first = runs_[run_of_[static_cast<size_t>(b.first)]].first;
      b.last = runs_[run_of_[static_cast<size_t>(b.last)]].end - 1;
    }
    std::vector<size_t> order;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].output < 0) order.push_back(i);
    }
    const auto size = [&](size_t i) { return bytes_of(buffers_[i]); };
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return size(a) > size(b); });
    std::vector<size_t> placed;  // by offset
    for (const size_t i : order) {
      Buffer& b = buffers_[i];
      int64_t end = 0;
      for (const size_t other : placed) {
        const Buffer& o = buffers_[other];
        if (o.first > b.last || b.first > o.last) continue;
        if (o.offset >= end + size(i)) break;
        end = std::max(end, o.offset + size(other));
      }
      b.offset = end;
      FR_CHECK_VALUE(!__builtin_add_overflow(end, size(i), &end),
                     "run_program: the maps have more than 2^63 bytes");
      bytes_ = std::max(bytes_, end);
      const auto after = std::find_if(placed.begin(), placed.end(), [&](size_t other) {
        return buffers_[other].offset > b.offset;
      });
      placed.insert(after, i);
    }
  }

  int64_t bytes_of(const Buffer& b) const {
    const int64_t batch = program_.values[0].n;
    const Run& run = runs_[run_of_[static_cast<size_t>(b.first)]];
    return rounded(b.bytes_per_image * (b.whole ? batch : run.most_images(batch)));
  }
};

}  // namespace

ProgramPlan make_plan(CheckedProgram program, int64_t threads) {
  ProgramPlan plan;
  plan.program = std::move(program);
  const CheckedProgram& p = plan.program;
  for (const Step& step : p.steps) {
    plan.algorithms.push_back(step.operation == kConv
                                  ? conv_algorithm(p.dtype, step.conv.shape, step.winograd)
                                  : ConvAlgorithm{nullptr});
  }
  if (p.values[0].n == 0) return plan;
  plan.runs = choose_runs(p, threads);
  const Arena arena(p, plan.runs);
  plan.places = arena.places();
  plan.arena_bytes = arena.bytes();
  return plan;
}

}  // namespace fr
