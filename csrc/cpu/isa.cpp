#include "isa.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstdlib>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef INTRA_OP_PARALLEL
#error "compile with -fopenmp; without it at::parallel_for runs on one thread"
#endif

namespace fr {
namespace {

#ifdef FR_HAVE_X86_KERNELS
KernelTable table_with(void (*replace)(KernelTable&), KernelTable table, const char* isa) {
  table.isa = isa;
  replace(table);
  return table;
}

const KernelTable& kernel_table_avx512_bf16() {
  static const KernelTable table =
      table_with(avx512_bf16::replace_bfloat16, kernel_table_avx512(), "avx512_bf16");
  return table;
}

const KernelTable& kernel_table_amx() {
  static const KernelTable table =
      table_with(amx::replace_bfloat16, kernel_table_avx512_bf16(), "amx");
  return table;
}

const KernelTable& kernel_table_amx_emulated() {
  static const KernelTable table =
      table_with(amx_emulated::replace_bfloat16, kernel_table_avx512_bf16(), "amx_emulated");
  return table;
}

// Linux lets a process use AMX's tiles (8 KiB of state per thread) only after it has requested
// permission, and kills it otherwise.
bool tiles_are_permitted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#ifdef FR_HAVE_X86_KERNELS
  // These builtins also check that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (pairs && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      tiles_are_permitted()) {
    tables.push_back(&kernel_table_amx());
  }
  if (pairs) tables.push_back(&kernel_table_avx512_bf16());
  if (avx512) tables.push_back(&kernel_table_avx512());
  if (avx2) tables.push_back(&kernel_table_avx2());
#endif
  tables.push_back(&kernel_table_portable());
#ifdef FR_HAVE_X86_KERNELS
  if (pairs)
    tables.push_back(&kernel_table_amx_emulated());  // for tests; last, so never the default
#endif
  return tables;
}

const KernelTable& choose() {
  const auto tables = supported_tables();
  const char* wanted = std::getenv("FUSED_RESNET_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.front();
  std::string names;
  for (const auto* table : tables) {
    if (std::string(wanted) == table->isa) return *table;
    names += names.empty() ? table->isa : std::string(", ") + table->isa;
  }
  TORCH_CHECK_VALUE(false, "FUSED_RESNET_ISA: expected one of ", names, " on this machine, got ",
                    wanted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const TrainingTable& training_kernels() {
  static const TrainingTable& table = []() -> const TrainingTable& {
#ifdef FR_HAVE_X86_KERNELS
    const std::string isa = kernels().isa;
    if (isa == "avx2") return training_table_avx2();
    if (isa != "portable") return training_table_avx512();
#endif
    return training_table_portable();
  }();
  return table;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto* table : supported_tables()) names.emplace_back(table->isa);
  return names;
}

at::ScalarType packed_type(at::ScalarType storage) {
  switch (kernels().of[dtype_of(storage)].packed) {
    case kFloat64:
      return at::kDouble;
    case kBFloat16:
      return at::kBFloat16;
    default:
      return at::kFloat;
  }
}

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false,
                       "fused_resnet: expected dtype float32, float64, bfloat16 or float16, ",
                       "got ", type);
  }
}

}  // namespace fr
