// Prints where NVIDIA's CuTe has the elements of the fragments that device.cuh's instructions use:
// a line "instruction operand thread value index" for each, the index counting down the columns.
#include <cstdio>

#include "cute/atom/copy_traits_sm75.hpp"
#include "cute/atom/mma_traits_sm80.hpp"
#include "cute/tensor.hpp"

namespace {

template <class Layout>
void print(const char* instruction, const char* operand, int values, int unit) {
  for (int thread = 0; thread < 32; ++thread) {
    for (int value = 0; value < values; ++value) {
      const int index = static_cast<int>(Layout{}(thread, value * unit)) / unit;
      std::printf("%s %s %d %d %d\n", instruction, operand, thread, value, index);
    }
  }
}

template <class Instruction>
void print_mma(const char* name, int values_a) {
  using Traits = cute::MMA_Traits<Instruction>;
  print<typename Traits::ALayout>(name, "a", values_a, 1);
  print<typename Traits::BLayout>(name, "b", values_a / 2, 1);
  print<typename Traits::CLayout>(name, "c", 4, 1);
}

}  // namespace

int main() {
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("float16", 8);
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16", 8);
  print_mma<cute::SM80_16x8x8_F32TF32TF32F32_TN>("tf32", 4);
  // Of a copy CuTe counts bits; here, elements of 16.
  using Matrices = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
  print<typename Matrices::SrcLayout>("ldmatrix", "row", 8, 16);
  print<typename Matrices::DstLayout>("ldmatrix", "register", 8, 16);
}
