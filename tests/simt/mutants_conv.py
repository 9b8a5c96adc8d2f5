"""Bugs planted in the convolution's CUDA kernels and in the block's that builds on them."""

from __future__ import annotations

from planting import Mutant

KERNELS = "csrc/cuda/kernels"
TILE = f"{KERNELS}/conv_tile.cuh"
ARITHMETIC = f"{KERNELS}/arithmetic.cuh"
SOURCE = f"{KERNELS}/conv_source.cuh"
CONV = f"{KERNELS}/conv_bn_add_relu.cuh"
STATISTICS = f"{KERNELS}/conv_statistics.cuh"
MOMENTS = f"{KERNELS}/moments.cuh"
BLOCK = f"{KERNELS}/residual_block.cuh"
_CONV_TESTS = "tests/conformance/test_conv_bn_add_relu.py"
SHAPES = f"{_CONV_TESTS}::test_awkward_shapes"
ALL_SHAPES = f"{_CONV_TESTS}::test_operation"
SPLITS = "tests/simt/test_cuda_conv_bn_add_relu.py::test_split_of_awkward_shapes"
CONV_STATISTICS = f"{_CONV_TESTS}::test_statistics_are_those_of_the_rounded_result"
ON_CHIP = "tests/conformance/test_residual_block.py::test_one_tile_on_chip"
LARGE_ON_CHIP = "tests/conformance/test_residual_block.py::test_the_middle_stays_on_chip"
SHORTCUT = "tests/conformance/test_residual_block.py::test_the_shortcut_in_the_same_sum"
RACE = ("race",)
ASAN = ("asan",)

MUTANTS = [
    # The pipeline of a matrix product.
    Mutant(
        "pipeline: no barrier before a stage is read",
        TILE,
        "      cp_async_wait<T::kStages - 2>();\n      __syncthreads();\n",
        "      cp_async_wait<T::kStages - 2>();\n",
        SHAPES,
        RACE,
    ),
    Mutant(
        "pipeline: waits for one stage too few",
        TILE,
        "cp_async_wait<T::kStages - 2>();",
        "cp_async_wait<T::kStages - 1>();",
        SHAPES,
    ),
    Mutant(
        "pipeline: no group committed in the last steps",
        TILE,
        "    // Commit empty groups too, so that the wait above always refers to the same one.\n",
        "    if (step < steps_)\n",
        ALL_SHAPES,
    ),
    Mutant(
        "pipeline: writes the stage that is being read",
        TILE,
        "bring(step + T::kStages - 1, read == 0 ? T::kStages - 1 : read - 1);",
        "bring(step + T::kStages - 1, read);",
        ALL_SHAPES,
    ),
    Mutant(
        "pipeline: warps of one row read the first one's columns",
        TILE,
        "return T::kBytesA + n * T::kWarpN * kStageRowBytes; }",
        "return T::kBytesA + 0 * T::kWarpN * kStageRowBytes; }",
        ALL_SHAPES,
    ),
    # Fragments.
    Mutant(
        "mma: the second register of B is the first",
        ARITHMETIC,
        "cols[j / 2][at], cols[j / 2][at + 1]",
        "cols[j / 2][at], cols[j / 2][at]",
        SHAPES,
    ),
    Mutant(
        "ldmatrix: rows of B in the wrong order",
        ARITHMETIC,
        "stage_offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);",
        "stage_offset(lane & 15, (lane >> 3) & 1);",
        SHAPES,
    ),
    Mutant(
        "ldmatrix: halves of A's depth swapped",
        ARITHMETIC,
        "flipped(operands.rows + stage, half * kUpperHalf)",
        "flipped(operands.rows + stage, (1 - half) * kUpperHalf)",
        SHAPES,
    ),
    Mutant(
        "tf32: low bits dropped, not rounded",
        ARITHMETIC,
        "fragment[i] = round_to_tf32(fragment[i]);",
        "fragment[i] &= ~0x1fffu;",
        f"{SHAPES} {ALL_SHAPES}",
    ),
    Mutant(
        "float32: one product of four left out",
        ARITHMETIC,
        "fmaf(rows[i][h].z, col.z, sum);",
        "fmaf(rows[i][h].z, 0.0f * col.z, sum);",
        SHAPES,
    ),
    Mutant(
        "float32: columns of a lane in tensor cores' order",
        ARITHMETIC,
        "return (e & 1) * 4 + (lane & 3); }",
        "return (e & 1) * 4 + (lane & 3) / 2 * 2; }",
        SHAPES,
    ),
    # Where operands come from.
    Mutant(
        "image: rows above the map are read",
        SOURCE,
        "static_cast<unsigned>(y) < static_cast<unsigned>(p_.image.h) &&",
        "y < p_.image.h &&",
        SHAPES,
        ("plain", "asan"),
    ),
    Mutant(
        "image: columns right of the map are read",
        SOURCE,
        "static_cast<unsigned>(x) < static_cast<unsigned>(p_.image.w);",
        "x >= 0;",
        SHAPES,
    ),
    Mutant(
        "image: the bits of a window's taps are those of a window one narrower",
        SOURCE,
        "(place_.ky * p_.image.kw + place_.kx)",
        "(place_.ky * (p_.image.kw - 1) + place_.kx)",
        SHAPES,
    ),
    Mutant(
        "image: dilation forgotten in a tap's place",
        SOURCE,
        "static_cast<int64_t>(at.ky * p_.image.dilation_h) * p_.image.w;",
        "static_cast<int64_t>(at.ky) * p_.image.w;",
        SHAPES,
    ),
    Mutant(
        "image: pixels past the last one are read",
        SOURCE,
        "const bool there = row < p.rows;",
        "const bool there = true;",
        SHAPES,
        ASAN,
    ),
    Mutant(
        "image: a pack's elements of the next tap taken from this one",
        SOURCE,
        "        at.advance(1, p_.image.kw, p_.group_c);\n",
        "",
        SHAPES,
    ),
    Mutant(
        "image: the shortcut's stride forgotten",
        SOURCE,
        "static_cast<int64_t>(ox) * s.stride_w * s.c;",
        "static_cast<int64_t>(ox) * s.c;",
        SHORTCUT,
    ),
    Mutant(
        "image: the shortcut's pixels past the last one are read",
        SOURCE,
        "taps_[i] = row < p_.rows ? 1 : 0;",
        "taps_[i] = 1;",
        SHORTCUT,
        ASAN,
    ),
    Mutant(
        "image: the shortcut is read where the first depth begins",
        SOURCE,
        "offset = k_ - depth1;",
        "offset = k_;",
        SHORTCUT,
        ("plain", "asan"),
    ),
    Mutant(
        "image: the shortcut's depth has no end",
        SOURCE,
        "tap = k_ < p_.depth ? 1 : 0;",
        "tap = 1;",
        SHORTCUT,
        ("plain", "asan"),
    ),
    Mutant(
        "filters: those past the last one are read",
        SOURCE,
        "const bool valid = i * kApart < filters_;",
        "const bool valid = true;",
        SHAPES,
        ASAN,
    ),
    Mutant(
        "filters: depth past a filter's end is the next filter's",
        SOURCE,
        "if (valid && k_ + e < depth_) pack",
        "if (valid) pack",
        SHAPES,
        ("plain", "asan"),
    ),
    Mutant(
        "groups: all read the first group's channels",
        CONV,
        "a(p, first_row, group * p.group_c,",
        "a(p, first_row, 0 * p.group_c,",
        SHAPES,
    ),
    Mutant(
        "launch: the last tile of rows left out",
        "csrc/cuda/conv_launch.cuh",
        "(static_cast<int64_t>(p.rows) + T::kM - 1) / T::kM;",
        "(static_cast<int64_t>(p.rows) + T::kM / 2) / T::kM;",
        SHAPES,
    ),
    Mutant(
        "launch: 16 bytes at a time whatever the channels",
        "csrc/cuda/conv_bn_add_relu.cu",
        "return aligned && p.group_k % (16 / element_bytes(precision)) == 0;",
        "return aligned;",
        SHAPES,
        ASAN,
    ),
    # Split sums and statistics.
    Mutant(
        "split: the last part is not added",
        CONV,
        "for (int split = 0; split < splits; ++split)",
        "for (int split = 0; split < splits - 1; ++split)",
        SPLITS,
    ),
    Mutant(
        "split: all parts begin at the first one's depth",
        CONV,
        "const int step0 = split * p.steps_per_split;",
        "const int step0 = 0 * p.steps_per_split;",
        SPLITS,
    ),
    Mutant(
        "split: parts write to one place",
        CONV,
        "static_cast<int64_t>(split) * p.rows * p.epilogue.k",
        "static_cast<int64_t>(0 * split) * p.rows * p.epilogue.k",
        SPLITS,
        RACE,
    ),
    Mutant(
        "statistics: a lane takes its own count for the other's",
        MOMENTS,
        "other.seen = __shfl_xor_sync(0xffffffffu, seen, lanes);",
        "other.seen = seen;",
        CONV_STATISTICS,
    ),
    Mutant(
        "statistics: a part slab counts as whole",
        STATISTICS,
        "(left < p.slab_rows ? (left < 0 ? 0 : left) : p.slab_rows)",
        "(left < 0 ? 0 : p.slab_rows)",
        CONV_STATISTICS,
    ),
    Mutant(
        "statistics: merged slabs keep the rows of one",
        "csrc/cuda/conv_bn_add_relu.cu",
        "    args.slab_rows *= args.span;\n",
        "",
        f"{_CONV_TESTS}::test_statistics_of_slabs_that_are_merged_twice",
    ),
    Mutant(
        "statistics: no barrier before the parts are read",
        STATISTICS,
        "  __syncthreads();\n  if (way != 0",
        "  if (way != 0",
        CONV_STATISTICS,
        RACE,
    ),
    # Two convolutions on chip.
    Mutant(
        "on chip: no barrier before the residual takes the filters' place",
        BLOCK,
        "    __syncthreads();  // the residual reuses",
        "    // the residual reuses",
        ON_CHIP,
        RACE,
    ),
    Mutant(
        "on chip: the second product begins before its filters have come",
        BLOCK,
        "    cp_async_wait<0>();\n    __syncthreads();\n    fill_affine",
        "    __syncthreads();\n    fill_affine",
        ON_CHIP,
        ("plain", "race"),
    ),
    Mutant(
        "on chip: no ReLU in the middle",
        BLOCK,
        "activate(fmaf(sum, by[e].x, by[e].y))",
        "fmaf(sum, by[e].x, by[e].y)",
        ON_CHIP,
    ),
    Mutant(
        "on chip: the middle's rows eight apart change places",
        BLOCK,
        "const int row = at.m * T::kWarpM + 8 * b + (lane >> 2);",
        "const int row = at.m * T::kWarpM + 8 * (b ^ 1) + (lane >> 2);",
        ON_CHIP,
    ),
    Mutant(
        "on chip: writes the middle while others still multiply",
        BLOCK,
        "  cp_async_wait<0>();\n  __syncthreads();\n\n  const int row0",
        "  cp_async_wait<0>();\n\n  const int row0",
        ON_CHIP,
        RACE,
    ),
    Mutant(
        "on chip: the second product has the first channels' scale and shift",
        BLOCK,
        "fill_affine<T>(affine, p.second.affine, n, p.second.k);",
        "fill_affine<T>(affine, p.second.affine, 0, p.second.k);",
        ON_CHIP,
    ),
    Mutant(
        "on chip: the residual is not waited for",
        BLOCK,
        "      bring_residual(n);\n      cp_async_wait<0>();\n",
        "      bring_residual(n);\n",
        f"{ON_CHIP} {LARGE_ON_CHIP}",
        ("plain", "race"),
    ),
    Mutant(
        "on chip: every part of the channels has the first one's residual",
        BLOCK,
        "residual(ring, p.second, first_row, n, p.first.rows, p.second.k);",
        "residual(ring, p.second, first_row, 0, p.first.rows, p.second.k);",
        ON_CHIP,
    ),
]
