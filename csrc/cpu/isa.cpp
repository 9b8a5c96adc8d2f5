#include "isa.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstdlib>

#ifndef INTRA_OP_PARALLEL
#error "compile with -fopenmp: at::parallel_for would run everything on one thread"
#endif

namespace fr {
namespace {

#ifdef FR_HAVE_X86_KERNELS
const KernelTable& kernel_table_avx512_bf16() {
  static const KernelTable table = [] {
    KernelTable t = kernel_table_avx512();
    t.isa = "avx512_bf16";
    avx512_bf16::replace_bfloat16(t);
    return t;
  }();
  return table;
}
#endif

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#ifdef FR_HAVE_X86_KERNELS
  // These builtins also ask whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&kernel_table_avx512_bf16());
    tables.push_back(&kernel_table_avx512());
  }
  if (avx2) tables.push_back(&kernel_table_avx2());
#endif
  tables.push_back(&kernel_table_portable());
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
