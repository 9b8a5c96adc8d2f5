"""Bugs planted in the epilogue of the convolution's CUDA kernels."""

from __future__ import annotations

from planting import Mutant

KERNELS = "csrc/cuda/kernels"
TILE = f"{KERNELS}/conv_tile.cuh"
EPILOGUE = f"{KERNELS}/conv_epilogue.cuh"
CONV = f"{KERNELS}/conv_bn_add_relu.cuh"
ELEMENT = "csrc/cuda/element.cuh"
_CONV_TESTS = "tests/conformance/test_conv_bn_add_relu.py"
_SIMT_TESTS = "tests/simt/test_cuda_conv_bn_add_relu.py"
SHAPES = f"{_CONV_TESTS}::test_awkward_shapes"
FLAGS = f"{_CONV_TESTS}::test_flags"
NON_FINITE = f"{_CONV_TESTS}::test_non_finite_values_pass_through"
CONV_STATISTICS = f"{_CONV_TESTS}::test_statistics_are_those_of_the_rounded_result"
PLANS = f"{_SIMT_TESTS}::test_every_plan"
SHORT = f"{_SIMT_TESTS}::test_a_residual_behind_a_short_sum"
LARGE = f"{_SIMT_TESTS}::test_large_tiles_in_every_build"
RACE = ("race",)
ASAN = ("asan",)

MUTANTS = [
    # The residual, which the pipeline fetches.
    Mutant(
        "residual: fetched for the row above",
        EPILOGUE,
        "const int pixel = 8 * part * Staged::kPerStage + 8 * band + row;",
        "const int pixel = max(0, 8 * part * Staged::kPerStage + 8 * band + row - 1);",
        SHAPES,
    ),
    Mutant(
        "residual: every part is the first one's",
        EPILOGUE,
        "const int pixel = 8 * part * Staged::kPerStage + 8 * band + row;",
        "const int pixel = 0 * part * Staged::kPerStage + 8 * band + row;",
        PLANS,
    ),
    Mutant(
        "residual: fetched past the last pixel",
        EPILOGUE,
        "return row < rows && channel < channels; }",
        "return channel < channels; }",
        SHAPES,
        ASAN,
    ),
    Mutant(
        "residual: fetched past the group's last channel",
        EPILOGUE,
        "return row < rows && channel < channels; }",
        "return row < rows; }",
        SHAPES,
        ("plain", "asan", "race"),
    ),
    Mutant(
        "residual: not waited for",
        CONV,
        "    cp_async_wait<0>();\n    __syncwarp();\n",
        "    __syncwarp();\n",
        SHAPES,
    ),
    Mutant(
        "residual: read before the warp's other lanes have it",
        CONV,
        "    cp_async_wait<0>();\n    __syncwarp();\n",
        "    cp_async_wait<0>();\n",
        SHAPES,
        RACE,
    ),
    Mutant(
        "residual: takes the stage that is being read",
        TILE,
        "    } else if (Tail::kParts > 0 && step - steps_ < Tail::kParts) {\n"
        "      tail_.bring(step - steps_, stage * T::kStageBytes);",
        "    } else if (Tail::kParts > 0 && step - steps_ < Tail::kParts) {\n"
        "      stage = stage + 1 == T::kStages ? 0 : stage + 1;\n"
        "      tail_.bring(step - steps_, stage * T::kStageBytes);",
        SHAPES,
        ("plain", "race"),
    ),
    Mutant(
        "residual: the first part is left out",
        TILE,
        "} else if (Tail::kParts > 0 && step - steps_ < Tail::kParts) {",
        "} else if (Tail::kParts > 0 && step > steps_ && step - steps_ < Tail::kParts) {",
        SHAPES,
        ("plain", "race"),
    ),
    Mutant(
        "residual: what the last step's stage takes is left out",
        CONV,
        "      if (Tail::kParts > 0) tail.bring(T::kStages - 1, last * T::kStageBytes);\n",
        "",
        PLANS,
    ),
    Mutant(
        "residual: takes the last step's stage while others multiply it",
        CONV,
        "    if constexpr (Staged::kParts > T::kStages - 1) {\n      __syncthreads();\n",
        "    if constexpr (Staged::kParts > T::kStages - 1) {\n",
        f"{LARGE} {SHORT}",
        RACE,
    ),
    Mutant(
        "residual: left out",
        EPILOGUE,
        "if (kEpilogue == Epilogue::kResidual) v += to_float(pair.values[e]);",
        "",
        FLAGS,
    ),
    Mutant(
        "residual: left out where channels come one by one",
        EPILOGUE,
        "activate(fmaf(sum, by.x, by.y) + r)",
        "activate(fmaf(sum, by.x, by.y))",
        SHAPES,
    ),
    Mutant(
        "residual: left out where a sum is split",
        CONV,
        "affine.shift[i]) + r[i]);",
        "affine.shift[i]));",
        PLANS,
    ),
    # The tile of results in shared memory.
    Mutant(
        "staged: no warp barrier between pairs and packs",
        EPILOGUE,
        "  __syncwarp();\n#pragma unroll\n  for (int part = 0;",
        "#pragma unroll\n  for (int part = 0;",
        SHAPES,
        RACE,
    ),
    Mutant(
        "staged: bands of two warps in one place",
        EPILOGUE,
        "static constexpr int kApart = T::kWarpsM * T::kWarpsN * kBandBytes;",
        "static constexpr int kApart = kBandBytes;",
        SHAPES,
        ("plain", "race"),
    ),
    Mutant(
        "staged: stages past the ring's end do not begin anew",
        EPILOGUE,
        "    if (stage >= T::kStages) stage -= T::kStages;\n",
        "",
        PLANS,
        ("plain", "asan"),
    ),
    Mutant(
        "staged: pairs are written without the permutation",
        EPILOGUE,
        "const int at = first ^ j * 8 * static_cast<int>(sizeof(U));",
        "const int at = first + j * 8 * static_cast<int>(sizeof(U));",
        SHAPES,
    ),
    Mutant(
        "staged: strict float32's second column is the tensor cores'",
        EPILOGUE,
        "    *reinterpret_cast<U*>(band + (at ^ 16)) = pair.values[1];",
        "    *reinterpret_cast<U*>(band + (at ^ 4)) = pair.values[1];",
        SHAPES,
    ),
    # Scale and shift.
    Mutant(
        "affine: every channel has the next one's scale and shift",
        EPILOGUE,
        "const ChannelAffine<1> of(affine, first + threadIdx.x, end);",
        "const ChannelAffine<1> of(affine, first + (threadIdx.x ^ 1), end);",
        FLAGS,
    ),
    Mutant(
        "affine: a pair's second channel has the first one's",
        EPILOGUE,
        "by[e] = affine[8 * j + Precision::column(e, lane)];",
        "by[e] = affine[8 * j + Precision::column(0, lane)];",
        FLAGS,
    ),
    Mutant(
        "affine: warps of one row have the first one's columns",
        CONV,
        "const float2* const columns = affine + at.n * T::kWarpN;",
        "const float2* const columns = affine + 0 * T::kWarpN;",
        PLANS,
    ),
    Mutant(
        "affine: every tile has the first one's channels",
        CONV,
        "fill_affine<T>(affine, p.epilogue.affine, first_filter, end);",
        "fill_affine<T>(affine, p.epilogue.affine, group * p.group_k, end);",
        PLANS,
    ),
    Mutant(
        "affine: read before the threads have filled it",
        CONV,
        "    if (!kIsPartial) fill_affine<T>(affine, p.epilogue.affine, first_filter, end);\n"
        "    const typename Precision::Operands operands(ring + at.rows_a(), ring + at.rows_b(), "
        "at.lane);\n"
        "    stage = pipeline.template run<Precision>(acc, operands);\n",
        "    const typename Precision::Operands operands(ring + at.rows_a(), ring + at.rows_b(), "
        "at.lane);\n"
        "    stage = pipeline.template run<Precision>(acc, operands);\n"
        "    if (!kIsPartial) fill_affine<T>(affine, p.epilogue.affine, first_filter, end);\n",
        SHAPES,
        RACE,
    ),
    Mutant(
        "affine: variance without eps",
        EPILOGUE,
        "sqrtf(a.var[c] + a.eps)",
        "sqrtf(a.var[c])",
        FLAGS,
    ),
    # What is stored.
    Mutant(
        "epilogue: channels past the group's end are stored",
        EPILOGUE,
        "    if (channel >= end) continue;\n",
        "",
        SHAPES,
        ("asan", "race"),
    ),
    Mutant(
        "epilogue: one row past the last is stored",
        EPILOGUE,
        "if (!y.has(pixel, column)) return;",
        "if (!y.has(pixel - 1, column)) return;",
        SHAPES,
        ASAN,
    ),
    Mutant(
        "epilogue: LeakyReLU lets negative numbers pass",
        ELEMENT,
        "a == Activation::kLeakyReLU ? static_cast<float>(kLeakySlope)",
        "a == Activation::kLeakyReLU ? 1.0f",
        FLAGS,
    ),
    Mutant(
        "epilogue: ReLU swallows NaN",
        ELEMENT,
        "return v < 0.0f ? fmaxf(v * slope, least) : v;",
        "return fmaxf(v * (v < 0.0f ? slope : 1.0f), least);",
        NON_FINITE,
    ),
    Mutant(
        "epilogue: ReLU makes NaN of negative infinity",
        ELEMENT,
        "return v < 0.0f ? fmaxf(v * slope, least) : v;",
        "return v < 0.0f ? v * slope : v;",
        NON_FINITE,
    ),
    # Statistics.
    Mutant(
        "statistics: of the results before rounding",
        EPILOGUE,
        "statistics.of[2 * j + e].add(to_float(pair.values[e]),",
        "statistics.of[2 * j + e].add(v,",
        CONV_STATISTICS,
    ),
    Mutant(
        "statistics: rows past the last count",
        EPILOGUE,
        "if (kEpilogue == Epilogue::kStatistics && 8 * b + (lane >> 2) < y.rows) {",
        "if (kEpilogue == Epilogue::kStatistics) {",
        CONV_STATISTICS,
    ),
    Mutant(
        "statistics: all lanes have seen as many rows as the first",
        EPILOGUE,
        "const int seen = (rows - (lane >> 2) + 7) / 8;",
        "const int seen = (rows + 7) / 8;",
        CONV_STATISTICS,
    ),
    Mutant(
        "statistics: a warp's channels in the place of its row's first",
        CONV,
        "store_statistics<Precision, T>(statistics, slab + channel0,",
        "store_statistics<Precision, T>(statistics, slab + first_filter,",
        f"{_CONV_TESTS}::test_statistics_over_many_slabs",
    ),
]
