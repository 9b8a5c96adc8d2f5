#include "program.h"

#include <unordered_map>
#include <utility>

#include "box.h"

namespace fr {
namespace {

class Programs {
 public:
  int64_t add(std::shared_ptr<const Program> program) {
    const std::lock_guard<std::mutex> lock(mutex_);
    programs_.emplace(++last_, std::move(program));
    return last_;
  }

  std::shared_ptr<const Program> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(number);
    FR_CHECK_VALUE(found != programs_.end(),
                   "run_program: program: expected the number of one, got ", number);
    return found->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<const Program> removed;  // destroyed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(number);
    if (found == programs_.end()) return;
    removed = std::move(found->second);
    programs_.erase(found);
  }

  static Programs& instance() {
    static Programs* const programs = new Programs;  // never destroyed: programs outlive main
    return *programs;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Program>> programs_;
  int64_t last_ = 0;
};

int64_t keep_program(TensorList tensors, IntArrayRef steps, IntArrayRef outputs) {
  return Programs::instance().add(std::make_shared<const Program>(
      Program::Tensors(tensors.begin(), tensors.end()), to_vector(steps), to_vector(outputs)));
}

}  // namespace

Program::Program(Tensors tensors, Ints steps, Ints outputs)
    : tensors_(std::move(tensors)), steps_(std::move(steps)), outputs_(std::move(outputs)) {}

std::shared_ptr<const KeptPlan> Program::plan() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return plan_;
}

void Program::keep(std::shared_ptr<const KeptPlan> plan) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  plan_.swap(plan);  // the previous one is destroyed after the lock is released
}

std::shared_ptr<const Program> kept_program(int64_t number) {
  return Programs::instance().get(number);
}

void release_program(int64_t number) { Programs::instance().remove(number); }

// Of no device: there may be no tensors.
STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) {
  m.impl("keep_program", FR_BOX(keep_program));
}

}  // namespace fr
