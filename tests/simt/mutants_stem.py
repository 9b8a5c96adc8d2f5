"""Bugs planted in the stem's CUDA kernel; the conformance suite catches each."""

from __future__ import annotations

from planting import Mutant

KERNEL = "csrc/cuda/kernels/conv_bn_relu_maxpool.cuh"
PLAN = "csrc/cuda/conv_bn_relu_maxpool.cu"

_TESTS = "tests/conformance/test_conv_bn_relu_maxpool.py"
_STEM = f"{_TESTS}::test_stem"
_WINDOWS = f"{_TESTS}::test_maxpool_windows"
_NON_FINITE = f"{_TESTS}::test_non_finite_values_reach_what_they_should"

MUTANTS = [
    Mutant(
        "stem: no activation",
        KERNEL,
        "activate(v)",
        "v",
        tests=f"{_TESTS}::test_activations",
    ),
    Mutant(
        "stem: tf32's low bits dropped, not rounded",
        KERNEL,
        "Precision::round(b);",
        "",
        tests=_STEM,
    ),
    Mutant(
        "stem: warps abreast multiply by the same filters",
        KERNEL,
        "const int row = column0 + 8 * j + (lane & 7) + (lane >> 4) * 8;",
        "const int row = 8 * j + (lane & 7) + (lane >> 4) * 8;",
        tests=_STEM,
    ),
    Mutant(
        "stem: elements at odd places are exchanged",
        KERNEL,
        "return low | high << 16;",
        "return low << 16 | high;",
        tests=_STEM,
    ),
    Mutant(
        "stem: filters are padded with the next row's weights",
        KERNEL,
        "ky < p.image.kh && at >= 0 && at < width;",
        "ky < p.image.kh && at >= 0;",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: no zeros left of the map",
        KERNEL,
        "inside && at >= 0 && at < end",
        "inside && at < end",
        tests=_STEM,
    ),
    Mutant(
        "stem: no zeros right of the map",
        KERNEL,
        "inside && at >= 0 && at < end",
        "inside && at >= 0",
        tests=_STEM,
    ),
    Mutant(
        "stem: a row below the map is read",
        KERNEL,
        "y >= 0 && y < p.image.h;\n    const Element* const row = static_cast",
        "y >= 0 && y <= p.image.h;\n    const Element* const row = static_cast",
        tests=_STEM,
        variants=("plain", "asan"),
    ),
    Mutant(
        "stem: two registers of A's fragment are exchanged",
        KERNEL,
        "a[i][1] = Gather::gather(first + pixels[i][1], low);\n"
        "        a[i][2] = Gather::gather(first + pixels[i][0], high);",
        "a[i][2] = Gather::gather(first + pixels[i][1], low);\n"
        "        a[i][1] = Gather::gather(first + pixels[i][0], high);",
        tests=_STEM,
    ),
    Mutant(
        "stem: ldmatrix brings B's halves of k the wrong way round",
        KERNEL,
        "((lane >> 3) & 1) * kPack<T>;",
        "(((lane >> 3) & 1) ^ 1) * kPack<T>;",
        tests=_STEM,
    ),
    Mutant(
        "stem: a fragment's lower rows are its upper ones",
        KERNEL,
        "8 * h + (lane >> 2);\n      if (row >= p.conv_rows",
        "(lane >> 2);\n      if (row >= p.conv_rows",
        tests=_STEM,
    ),
    Mutant(
        "stem: dilation is forgotten along a row",
        KERNEL,
        "kx * p.image.dilation_w * p.image.c + c;",
        "kx * p.image.c + c;",
        tests=_STEM,
    ),
    Mutant(
        "stem: the second block of channels has the first's scale and shift",
        KERNEL,
        "a(p.affine, channel0 + threadIdx.x, p.k);",
        "a(p.affine, threadIdx.x, p.k);",
        tests=_STEM,
    ),
    Mutant(
        "stem: windows reach below the convolution's map",
        KERNEL,
        "if (cy < 0 || cy >= p.conv_h) continue;",
        "if (cy < 0) continue;",
        tests=_WINDOWS,
    ),
    Mutant(
        "stem: windows reach left of the convolution's map",
        KERNEL,
        "if (cx < 0 || cx >= p.conv_w) continue;",
        "if (cx >= p.conv_w) continue;",
        tests=_STEM,
    ),
    Mutant(
        "stem: channels past the last are written",
        KERNEL,
        "if (channel + e < p.k) y[e] = from_float<T>(best[e]);",
        "y[e] = from_float<T>(best[e]);",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: the last tile of a row is forgotten",
        PLAN,
        "p->tiles_x = static_cast<int>(ceil_div(p->out_w, tile_w));",
        "p->tiles_x = static_cast<int>(p->out_w / tile_w);",
        tests=_STEM,
    ),
    Mutant(
        "stem: multiplies before x is there",
        KERNEL,
        "  cp_async_wait<1>();\n  __syncthreads();\n",
        "  cp_async_wait<1>();\n",
        tests=_STEM,
        variants=("race",),
    ),
    Mutant(
        "stem: pools before the tile is there",
        KERNEL,
        "    __syncthreads();  // the tile and the next patch are there, and this one is free\n",
        "",
        tests=_STEM,
        variants=("race",),
    ),
    Mutant(
        "stem: what pads a kernel's row is not masked",
        KERNEL,
        "? 0x0000ffffu : 0xffffffffu",
        "? 0xffffffffu : 0xffffffffu",
        tests=_NON_FINITE,
    ),
    Mutant(
        "stem: filters past the last are read",
        KERNEL,
        "channel0 + row < p.k && ky",
        "ky",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: rows past the tile read past x",
        KERNEL,
        "      if (row >= p.conv_rows * p.conv_cols) row = 0;\n",
        "",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: pooling drops NaN",
        KERNEL,
        "return v > best || v != v ? v : best;",
        "return v > best ? v : best;",
        tests=_NON_FINITE,
    ),
    Mutant(
        "stem: the window passes the convolution's last column",
        KERNEL,
        "if (cx < 0 || cx >= p.conv_w) continue;",
        "if (cx < 0) continue;",
        tests=f"{_STEM} {_WINDOWS}",
    ),
    Mutant(
        "stem: the shared memory that is asked for lacks the table's",
        PLAN,
        "           buffer(p.depth / depth * static_cast<int64_t>(sizeof(StemPlace))) +\n",
        "",
        tests=_STEM,
    ),
]
