// Runs a program depth-first: a micro-batch goes through all steps of a run before the next one
// starts, so that its maps are still in the cache when they are read. One thread team runs the
// whole program; maps inside are in one arena, where values that are not needed at the same time
// share memory, and a convolution adds to its residual in place.
#include "run_program.h"

#include "../box.h"
#include "../checks.h"
#include "../program.h"
#include "../tensor.h"
#include "conv_bn_add_relu.h"
#include "layers.h"
#include "program_plan.h"
#include "result_cache.h"

namespace fr {
namespace {

int64_t team_size() { return in_parallel_region() ? 1 : get_num_threads(); }

// A call: a plan and the memory that its values lie in. All threads of a team run it.
class Execution {
 public:
  // `bases` has the addresses of x, the arena and the outputs.
  Execution(const ProgramPlan& plan, const std::vector<char*>& bases)
      : plan_(plan), bases_(bases) {}

  void run(ThreadTeam& team) const {
    const int64_t batch = plan_.program.values[0].n;
    for (const Run& r : plan_.runs) {
      for (int64_t part = 0; part < r.micro_batches; ++part) {
        const int64_t n0 = batch * part / r.micro_batches,
                      n1 = batch * (part + 1) / r.micro_batches;
        for (int64_t i = r.first; i < r.end; ++i) run_step(team, i, n0, n1 - n0);
      }
    }
  }

 private:
  const ProgramPlan& plan_;
  const std::vector<char*>& bases_;

  // The address of a value of the micro-batch that begins with image n0.
  char* address(int64_t value, int64_t n0) const {
    const Place& p = plan_.places[static_cast<size_t>(value)];
    char* const base = bases_[static_cast<size_t>(p.base)] + p.offset;
    return p.whole ? base + n0 * plan_.program.image_bytes(value) : base;
  }

  void run_step(ThreadTeam& team, int64_t index, int64_t n0, int64_t images) const {
    const CheckedProgram& p = plan_.program;
    const Step& step = p.steps[static_cast<size_t>(index)];
    const MapSizes& input = p.values[static_cast<size_t>(step.input)];
    const Kernels& k = kernels().of[p.dtype];
    const char* x = address(step.input, n0);
    const char* residual = step.residual < 0 ? nullptr : address(step.residual, n0);
    char* y = address(index + 1, n0);
    switch (step.operation) {
      case kConv:
      case kConvMaxPool: {
        ConvForward f = step.conv;
        f.shape.n = images;
        f.x = x;
        f.residual = residual;
        f.y = y;
        if (step.operation == kConvMaxPool)
          return run_conv_max_pool(team, p.dtype, f, step.pool, y);
        return run_conv(team, p.dtype, f, plan_.algorithms[static_cast<size_t>(index)]);
      }
      case kMaxPool:
      case kAvgPool: {
        PoolForward f = step.pool;
        f.x = x;
        return run_pool(team, p.dtype, step.operation == kMaxPool ? k.max_pool : k.avg_pool, images,
                        f, y);
      }
      case kZeroPadShortcut:
        return run_zero_pad(team, p.dtype, images, step.pad, x, y);
      case kGlobalAvgPool:
        return run_global_avg_pool(team, p.dtype, images, {input.h, input.w, input.c, x, y});
      case kLinear: {
        LinearForward f = step.linear;
        f.x = x;
        f.y = y;
        return run_linear(team, p.dtype, images, f);
      }
      default:
        return run_add_relu(team, p.dtype, images * input.image_numel(),
                            {x, residual, y, step.activation});
    }
  }
};

std::vector<Tensor> execute(const ProgramPlan& plan, const Tensor& x) {
  std::vector<Tensor> outputs;
  const Options options = x.options();
  for (const int64_t value : plan.program.outputs) {
    const MapSizes& sizes = plan.program.values[static_cast<size_t>(value)];
    outputs.push_back(sizes.flat ? empty(sizes.shape(), options)
                                 : empty_map(sizes.shape(), options));
  }
  if (plan.program.values[0].n == 0) return outputs;
  const Tensor input = x.contiguous(kChannelsLast);
  const ResultMemory arena(plan.arena_bytes);
  // No step writes to x.
  std::vector<char*> bases{const_cast<char*>(input.const_data_ptr<char>()), arena.get()};
  for (const Tensor& y : outputs) bases.push_back(y.mutable_data_ptr<char>());
  const Execution execution(plan, bases);
  run_on_thread_team([&](ThreadTeam& team) { execution.run(team); });
  return outputs;
}

}  // namespace

// What a plan was derived from, as far as it can change between two calls of a Program.
struct TensorMark {
  const void* data;
  size_t bytes;
  int64_t numel;
  ScalarType type;

  static TensorMark of(const Tensor& t) {
    return {t.const_data_ptr(), t.storage_nbytes(), t.numel(), t.scalar_type()};
  }

  bool operator==(const TensorMark& o) const {
    return data == o.data && bytes == o.bytes && numel == o.numel && type == o.type;
  }
};

struct KeptPlan {
  ProgramPlan plan;
  std::vector<int64_t> sizes;  // of x
  int64_t threads;
  std::vector<TensorMark> tensors;

  bool fits(const Tensor& x, TensorList now, int64_t team) const {
    if (!x.sizes().equals(sizes) || x.scalar_type() != plan.program.type || team != threads)
      return false;
    for (size_t i = 0; i < now.size(); ++i) {
      if (!now[i].is_contiguous() || !(TensorMark::of(now[i]) == tensors[i])) return false;
    }
    return true;
  }
};

namespace {

ProgramPlan plan_of(const Tensor& x, TensorList tensors, IntArrayRef steps, IntArrayRef outputs,
                    int64_t threads) {
  return make_plan(check_program(nullptr, x.sizes(), x, tensors, steps, outputs), threads);
}

std::vector<Tensor> run_program_cpu(const Tensor& x, TensorList tensors, IntArrayRef steps,
                                    IntArrayRef outputs) {
  check_map(kRunProgram, "x", x);
  return execute(plan_of(x, tensors, steps, outputs, team_size()), x);
}

std::vector<Tensor> run_kept_program_cpu(const Tensor& x, int64_t number) {
  const std::shared_ptr<const Program> program = kept_program(number);
  const TensorList tensors = program->tensors();
  check_map(kRunProgram, "x", x);
  const int64_t threads = team_size();
  const std::shared_ptr<const KeptPlan> kept = program->plan();
  if (kept && kept->fits(x, tensors, threads)) return execute(kept->plan, x);
  ProgramPlan plan = plan_of(x, tensors, program->steps(), program->outputs(), threads);
  // A plan with copies of operands would fit no other call, so its memory is not kept.
  if (!plan.program.copies.empty()) return execute(plan, x);
  auto made = std::make_shared<KeptPlan>();
  *made = {std::move(plan), to_vector(x.sizes()), threads, {}};
  for (const Tensor& t : tensors) made->tensors.push_back(TensorMark::of(t));
  program->keep(made);
  return execute(made->plan, x);
}

}  // namespace

Tensor run_as_program(const char* op, const Tensor& x, TensorList tensors, IntArrayRef steps) {
  const auto last = static_cast<int64_t>(steps.size()) / kNumFields;
  return execute(make_plan(check_program(op, x.sizes(), x, tensors, steps, {last}), team_size()), x)
      .front();
}

std::vector<StepReport> program_report(const Program& program, IntArrayRef sizes, ScalarType type) {
  const Tensor like = empty({0}, type);
  const ProgramPlan plan = make_plan(
      check_program(nullptr, sizes, like, program.tensors(), program.steps(), program.outputs()),
      team_size());
  std::vector<StepReport> report;
  for (size_t i = 0; i < plan.program.steps.size(); ++i) {
    const Operation operation = plan.program.steps[i].operation;
    const bool is_conv = operation == kConv || operation == kConvMaxPool;
    report.emplace_back(plan.program.values[i + 1].shape(),
                        is_conv ? plan.algorithms[i].name() : "", 0);
  }
  for (const Run& r : plan.runs) {
    for (int64_t i = r.first; i < r.end; ++i)
      std::get<2>(report[static_cast<size_t>(i)]) = r.most_images(sizes[0]);
  }
  return report;
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("run_program", FR_BOX(run_program_cpu));
  m.impl("run_program.kept", FR_BOX(run_kept_program_cpu));
}

}  // namespace fr
