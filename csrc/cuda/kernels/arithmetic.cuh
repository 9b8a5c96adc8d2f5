// How a warp multiplies one stage of shared memory: 64 bytes of depth of its rows of A and of B.
//
// A warp computes kRows16 x 16 rows and kCols8 x 8 columns. For every precision the accumulator
// acc[i][j][e] belongs to row 16 i + lane / 4 + 8 (e / 2) and column 8 j + column(e).
//
// A stage stores each row's 64 bytes as four chunks of 16, permuted: chunk c of row r is at
// position c ^ (r / 2 mod 4). The same chunk of eight consecutive rows is then in eight different
// groups of four banks, so that ldmatrix, and 16-byte loads of eight rows, have no bank conflicts.
#pragma once

#include "../element.cuh"

namespace fr {

constexpr int kStageRowBytes = 64;
constexpr int kChunks = kStageRowBytes / 16;

FR_DEVICE int stage_offset(int row, int chunk) {
  return row * kStageRowBytes + ((chunk ^ (row >> 1)) & (kChunks - 1)) * 16;
}

// The permutation repeats every eight rows, and the addresses of the upper half of a row's chunks
// differ from those of the lower half in one bit, as stages begin at multiples of 64 bytes. So one
// address per lane and operand, computed once before the loop over the depth, serves all of its
// loads, with immediate constants.
constexpr int kUpperHalf = 32;

// Tensor cores: float16, bfloat16, or float32 rounded to tf32, with float32 accumulators.
template <class Precision>
struct TensorCores {
  // Where a lane finds its operands in the first stage: the warp's rows of A begin at `a`, those of
  // B at `b`.
  class Operands {
   public:
    FR_DEVICE Operands(unsigned char* a, unsigned char* b, int lane) {
      const int of_a = stage_offset(lane & 15, lane >> 4);
      const int of_b = stage_offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
      rows = opaque(shared_address(a) + of_a);
      cols = opaque(shared_address(b) + of_b);
    }

    SharedAddress rows, cols;
  };

  // `stage` is the stage's distance from the first one in bytes.
  template <int kRows16, int kCols8>
  FR_DEVICE static void multiply(float (&acc)[kRows16][kCols8][4], const Operands& operands,
                                 int stage) {
    static_assert(kCols8 % 2 == 0, "ldmatrix brings the fragments of two column groups");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SharedAddress half_a = flipped(operands.rows + stage, half * kUpperHalf);
      const SharedAddress half_b = flipped(operands.cols + stage, half * kUpperHalf);
      uint32_t rows[kRows16][4], cols[kCols8 / 2][4];
#pragma unroll
      for (int i = 0; i < kRows16; ++i) {
        ldmatrix_x4(rows[i], half_a + i * 16 * kStageRowBytes);
        Precision::round(rows[i]);
      }
#pragma unroll
      for (int j = 0; j < kCols8 / 2; ++j) {
        ldmatrix_x4(cols[j], half_b + j * 16 * kStageRowBytes);
        Precision::round(cols[j]);
      }
#pragma unroll
      for (int i = 0; i < kRows16; ++i) {
#pragma unroll
        for (int j = 0; j < kCols8; ++j) {
          const int at = (j & 1) * 2;
          Precision::mma(acc[i][j], rows[i], cols[j / 2][at], cols[j / 2][at + 1]);
        }
      }
    }
  }

  // Neighbours for e = 0 and 1.
  static constexpr bool kPairs = true;
  FR_DEVICE static int column(int e, int lane) { return (lane & 3) * 2 + (e & 1); }
};

struct Float16 : TensorCores<Float16> {
  using Storage = __half;
  FR_DEVICE static void round(uint32_t (&)[4]) {}
  FR_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_f16(d, a, b0, b1);
  }
};

struct BFloat16 : TensorCores<BFloat16> {
  using Storage = __nv_bfloat16;
  FR_DEVICE static void round(uint32_t (&)[4]) {}
  FR_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  }
};

// ldmatrix moves 32-bit elements as pairs of 16-bit ones, and its fragments are those of m16n8k8.
// The tensor cores would drop the low bits: rounding them first halves the error.
struct Tf32 : TensorCores<Tf32> {
  using Storage = float;
  FR_DEVICE static void round(uint32_t (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = round_to_tf32(fragment[i]);
  }
  FR_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  }
};

// Strict float32 on CUDA cores. A lane's rows are eight apart and its columns four, so one load
// serves all lanes that share a row or a column. Four products are summed before they are added to
// the accumulator: a fifth instruction for every four, and half the rounding error of one long
// chain.
struct Float32 {
  using Storage = float;

  struct Operands {
    FR_DEVICE Operands(const unsigned char* a_, const unsigned char* b_, int lane_)
        : a(a_), b(b_), lane(lane_) {}
    const unsigned char *a, *b;
    int lane;
  };

  template <int kRows16, int kCols8>
  FR_DEVICE static void multiply(float (&acc)[kRows16][kCols8][4], const Operands& operands,
                                 int stage) {
    const unsigned char *const a = operands.a + stage, *const b = operands.b + stage;
    const int lane = operands.lane;
// If unrolled, the compiler would load all chunks at once and run out of registers.
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float4 rows[kRows16][2];
#pragma unroll
      for (int i = 0; i < kRows16; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * i + 8 * h + (lane >> 2);
          rows[i][h] = *reinterpret_cast<const float4*>(a + stage_offset(row, chunk));
        }
      }
#pragma unroll
      for (int j = 0; j < kCols8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * j + column(e, lane);
          const float4 col = *reinterpret_cast<const float4*>(b + stage_offset(row, chunk));
#pragma unroll
          for (int i = 0; i < kRows16; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float sum = rows[i][h].x * col.x;
              sum = fmaf(rows[i][h].y, col.y, sum);
              sum = fmaf(rows[i][h].z, col.z, sum);
              acc[i][j][2 * h + e] += fmaf(rows[i][h].w, col.w, sum);
            }
          }
        }
      }
    }
  }

  static constexpr bool kPairs = false;
  FR_DEVICE static int column(int e, int lane) { return (e & 1) * 4 + (lane & 3); }
};

}  // namespace fr
