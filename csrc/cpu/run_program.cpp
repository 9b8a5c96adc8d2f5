// Runs a program depth-first: a micro-batch goes through all steps of a run before the next one
// starts, so that its maps are still in the cache when they are read. One thread team runs the
// whole program; maps inside are in one arena, where values that are not needed at the same time
// share memory, and a convolution adds to its residual in place.
#include "run_program.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "../program.h"
#include "conv_bn_add_relu.h"
#include "layers.h"
#include "program_plan.h"
#include "result_cache.h"

namespace fr {
namespace {

constexpr const char* kOp = "run_program";

int64_t team_size() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// A call: a plan and the memory that its values lie in. All threads of a team run it.
class Execution {
 public:
  // `bases` has the addresses of x, the arena and the outputs.
  Execution(const ProgramPlan& plan, const std::vector<char*>& bases)
      : plan_(plan), bases_(bases) {}

  void run(ThreadTeam& team) const {
    const int64_t batch = plan_.program.values[0].n;
    for (const Run& r : plan_.runs) {
      for (int64_t part = 0; part < r.parts; ++part) {
        const int64_t n0 = batch * part / r.parts, n1 = batch * (part + 1) / r.parts;
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
                            {x, residual, y, step.relu});
    }
  }
};

std::vector<at::Tensor> execute(const ProgramPlan& plan, const at::Tensor& x) {
  std::vector<at::Tensor> outputs;
  for (const int64_t value : plan.program.outputs) {
    const MapSizes& sizes = plan.program.values[static_cast<size_t>(value)];
    outputs.push_back(sizes.flat ? at::empty(sizes.shape(), x.options())
                                 : empty_map(sizes.shape(), x.options()));
  }
  if (x.size(0) == 0) return outputs;
  const auto input = x.expect_contiguous(kChannelsLast);
  const c10::DataPtr arena = result_memory(plan.arena_bytes);
  // No step writes to x.
  std::vector<char*> bases{const_cast<char*>(static_cast<const char*>(input->const_data_ptr())),
                           static_cast<char*>(arena.get())};
  for (const at::Tensor& y : outputs) bases.push_back(static_cast<char*>(y.mutable_data_ptr()));
  const Execution execution(plan, bases);
  run_on_thread_team([&](ThreadTeam& team) { execution.run(team); });
  return outputs;
}

// What a plan was derived from, as far as it can change between two calls of a Program.
struct TensorMark {
  const c10::StorageImpl* storage;
  const void* data;
  size_t bytes;
  int64_t numel;
  at::ScalarType type;

  static TensorMark of(const at::Tensor& t) {
    return {t.storage().unsafeGetStorageImpl(), t.const_data_ptr(), t.storage().nbytes(), t.numel(),
            t.scalar_type()};
  }

  bool operator==(const TensorMark& o) const {
    return storage == o.storage && data == o.data && bytes == o.bytes && numel == o.numel &&
           type == o.type;
  }
};

}  // namespace

struct KeptPlan {
  ProgramPlan plan;
  std::vector<int64_t> sizes;  // of x
  int64_t threads;
  std::vector<TensorMark> tensors;

  bool fits(const at::Tensor& x, at::TensorList now, int64_t team) const {
    if (x.sizes() != sizes || x.scalar_type() != plan.program.type || team != threads) return false;
    for (size_t i = 0; i < now.size(); ++i) {
      if (!now[i].is_contiguous() || !(TensorMark::of(now[i]) == tensors[i])) return false;
    }
    return true;
  }
};

namespace {

std::vector<at::Tensor> run_program_cpu(const at::Tensor& x, at::TensorList tensors,
                                        at::IntArrayRef steps, at::IntArrayRef outputs) {
  check_map(kOp, "x", x);
  const Program* caller = Program::caller(tensors, steps, outputs);
  const int64_t threads = team_size();
  std::shared_ptr<const KeptPlan> kept = caller ? caller->plan() : nullptr;
  if (kept && kept->fits(x, tensors, threads)) return execute(kept->plan, x);
  ProgramPlan plan =
      make_plan(check_program(nullptr, x.sizes(), x, tensors, steps, outputs), threads);
  // Copies of operands are those of this call.
  if (caller == nullptr || !plan.program.copies.empty()) return execute(plan, x);
  auto made = std::make_shared<KeptPlan>();
  *made = {std::move(plan), x.sizes().vec(), threads, {}};
  for (const at::Tensor& t : tensors) made->tensors.push_back(TensorMark::of(t));
  caller->keep(made);
  return execute(made->plan, x);
}

}  // namespace

at::Tensor run_as_program(const char* op, const at::Tensor& x, at::TensorList tensors,
                          at::IntArrayRef steps) {
  const auto last = static_cast<int64_t>(steps.size()) / kNumFields;
  return execute(make_plan(check_program(op, x.sizes(), x, tensors, steps, {last}), team_size()), x)
      .front();
}

std::vector<StepReport> program_report(const std::vector<at::Tensor>& tensors,
                                       const std::vector<int64_t>& steps,
                                       const std::vector<int64_t>& outputs,
                                       const std::vector<int64_t>& sizes, at::ScalarType dtype) {
  const at::Tensor like = at::empty({0}, dtype);
  const ProgramPlan plan =
      make_plan(check_program(nullptr, sizes, like, tensors, steps, outputs), team_size());
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

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) { m.impl("run_program", &run_program_cpu); }

}  // namespace fr
