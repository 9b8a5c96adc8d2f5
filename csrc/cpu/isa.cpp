#include "isa.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

#include "../tensor.h"
#endif

namespace fr {
namespace {

// A table that was not compiled is named in the discarded branch of an `if constexpr` alone, so the
// linker does not need it.

[[maybe_unused]] KernelTable table_with(void (*replace)(KernelTable&), KernelTable table,
                                        const char* isa) {
  table.isa = isa;
  replace(table);
  return table;
}

[[maybe_unused]] const KernelTable& kernel_table_avx512_bf16() {
  static const KernelTable table =
      table_with(avx512_bf16::replace_bfloat16, kernel_table_avx512(), "avx512_bf16");
  return table;
}

[[maybe_unused]] const TrainingTable& training_table_avx512_bf16() {
  static const TrainingTable table = [] {
    TrainingTable pairs = training_table_avx512();
    avx512_bf16::replace_bfloat16(pairs);
    return pairs;
  }();
  return table;
}

[[maybe_unused]] const KernelTable& kernel_table_amx() {
  static const KernelTable table =
      table_with(amx::replace_bfloat16, kernel_table_avx512_bf16(), "amx");
  return table;
}

[[maybe_unused]] const KernelTable& kernel_table_amx_emulated() {
  static const KernelTable table =
      table_with(amx_emulated::replace_bfloat16, kernel_table_avx512_bf16(), "amx_emulated");
  return table;
}

// Linux lets a process use AMX's tiles (8 KiB of state per thread) only after it has requested
// permission, and kills it otherwise.
[[maybe_unused]] bool tiles_are_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

struct Processor {
  bool avx2 = false, avx512 = false, bfloat16_pairs = false, bfloat16_tiles = false;
};

Processor processor() {
  Processor has;
#ifdef __x86_64__
  // These builtins also check that the operating system saves the wide registers.
  __builtin_cpu_init();
  has.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
  has.avx512 = has.avx2 && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
  has.bfloat16_pairs = has.avx512 && __builtin_cpu_supports("avx512bf16");
  has.bfloat16_tiles = has.bfloat16_pairs && __builtin_cpu_supports("amx-tile") &&
                       __builtin_cpu_supports("amx-bf16") && tiles_are_permitted();
#endif
  return has;
}

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
  const Processor has = processor();
  if constexpr (FR_HAVE_AMX) {
    if (has.bfloat16_tiles) tables.push_back(&kernel_table_amx());
  }
  if constexpr (FR_HAVE_AVX512_BF16) {
    if (has.bfloat16_pairs) tables.push_back(&kernel_table_avx512_bf16());
  }
  if constexpr (FR_HAVE_AVX512) {
    if (has.avx512) tables.push_back(&kernel_table_avx512());
  }
  if constexpr (FR_HAVE_AVX2) {
    if (has.avx2) tables.push_back(&kernel_table_avx2());
  }
  tables.push_back(&kernel_table_portable());
  if constexpr (FR_HAVE_AMX_EMULATED) {
    // For tests; last, so never the default.
    if (has.bfloat16_pairs) tables.push_back(&kernel_table_amx_emulated());
  }
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
  FR_CHECK_VALUE(false, "FUSED_RESNET_ISA: expected one of ", names, " on this machine, got ",
                 wanted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const TrainingTable& training_kernels() {
  static const TrainingTable& table = []() -> const TrainingTable& {
    const std::string isa = kernels().isa;
    if constexpr (FR_HAVE_AVX2) {
      if (isa == "avx2") return training_table_avx2();
    }
    if constexpr (FR_HAVE_AVX512) {
      if (isa == "avx512") return training_table_avx512();
    }
    if constexpr (FR_HAVE_AVX512_BF16) {
      if (isa != "avx2" && isa != "portable") return training_table_avx512_bf16();
    }
    return training_table_portable();
  }();
  return table;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto* table : supported_tables()) names.emplace_back(table->isa);
  return names;
}

ScalarType packed_type(ScalarType storage) {
  switch (kernels().of[dtype_of(storage)].packed) {
    case kFloat64:
      return ScalarType::Double;
    case kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Float;
  }
}

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      FR_CHECK_TYPE(false, "fused_resnet: expected dtype float32, float64, bfloat16 or float16, ",
                    "got ", type);
  }
}

}  // namespace fr
