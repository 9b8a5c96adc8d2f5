"""Bugs planted in how the stem's CUDA kernel loads images; the conformance suite catches each."""

from __future__ import annotations

from mutants_stem import KERNEL, PLAN
from planting import Mutant

HOST = "csrc/cuda/host/conv_bn_relu_maxpool.cpp"

_TESTS = "tests/conformance/test_conv_bn_relu_maxpool.py"
_STEM = f"{_TESTS}::test_stem"
_NON_FINITE = f"{_TESTS}::test_non_finite_values_reach_what_they_should"

MUTANTS = [
    Mutant(
        "stem: the next image comes into the patch that is multiplied next",
        KERNEL,
        "stem_bring_patch(p, patch, t + 2 * gridDim.x);",
        "stem_bring_patch(p, next_patch, t + 2 * gridDim.x);",
        tests=_STEM,
    ),
    Mutant(
        "stem: every tile is multiplied from the first patch",
        KERNEL,
        "    patch = next_patch;\n",
        "",
        tests=_STEM,
    ),
    Mutant(
        "stem: both patches begin with the first tile",
        KERNEL,
        "blockIdx.x + i * gridDim.x);",
        "blockIdx.x);",
        tests=_STEM,
    ),
    Mutant(
        "stem: the next tile is loaded, not the one behind it",
        KERNEL,
        "t + 2 * gridDim.x);",
        "t + gridDim.x);",
        tests=_STEM,
    ),
    Mutant(
        "stem: no wait for the first patch",
        KERNEL,
        "cp_async_wait<1>();",
        "cp_async_wait<2>();",
        tests=_STEM,
    ),
    Mutant(
        "stem: no wait for the next patch",
        KERNEL,
        "cp_async_wait<0>();",
        "cp_async_wait<1>();",
        tests=_STEM,
    ),
    Mutant(
        "stem: the first patch waits for one group of copies only, and has none of its own",
        KERNEL,
        "  cp_async_commit();\n",
        "",
        tests=_STEM,
    ),
    Mutant(
        "stem: results are written while others still pool",
        KERNEL,
        "    __syncthreads();  // the previous tile is pooled\n",
        "",
        tests=_STEM,
        variants=("race",),
    ),
    Mutant(
        "stem: a chunk across the beginning of a row is copied whole",
        KERNEL,
        "if (there && (first < 0 || first + kElements > end)) {",
        "if (there && first + kElements > end) {",
        tests=_STEM,
    ),
    Mutant(
        "stem: a chunk across the end of a row is copied whole",
        KERNEL,
        "if (there && (first < 0 || first + kElements > end)) {",
        "if (there && first < 0) {",
        tests=_STEM,
    ),
    Mutant(
        "stem: an element past the end of a row is in its last chunk",
        KERNEL,
        "first + e >= 0 && first + e < end ?",
        "first + e >= 0 && first + e <= end ?",
        tests=_STEM,
    ),
    Mutant(
        "stem: chunks below the map are copied",
        KERNEL,
        "const bool inside = y >= 0 && y < p.image.h;\n    const Element* const row = map",
        "const bool inside = y >= 0;\n    const Element* const row = map",
        tests=_STEM,
        variants=("plain", "asan"),
    ),
    Mutant(
        "stem: the last chunk of a row is left out",
        KERNEL,
        "for (; at < p.patch_width; at += kStemRowLanes * kElements) {",
        "for (; at + kElements < p.patch_width; at += kStemRowLanes * kElements) {",
        tests=_STEM,
        variants=("plain", "race"),
    ),
    Mutant(
        "stem: pixels are read from the patch's first chunk on",
        KERNEL,
        "patch + place.template skew<Element>(p);",
        "patch;",
        tests=_STEM,
    ),
    Mutant(
        "stem: a patch's rows are whole chunks, whatever those of x are",
        PLAN,
        "modulo(row - least, elements)",
        "modulo(-least, elements)",
        tests=_STEM,
    ),
    Mutant(
        "stem: a patch's rows have no place for their skew",
        PLAN,
        "const int64_t least = skew + width;",
        "const int64_t least = width;",
        tests=_STEM,
        variants=("plain", "race"),
    ),
    Mutant(
        "stem: chunks are copied from addresses that are no multiples of 16",
        HOST,
        "params_.chunks && reinterpret_cast<uintptr_t>(params_.image.x) % 16 == 0;",
        "params_.chunks;",
        tests=f"{_TESTS}::test_views_give_what_their_copies_give",
    ),
    Mutant(
        "stem: words of pairs are not aligned in odd rows",
        PLAN,
        "p->chunks = !p->pairs || row % 2 == 0;",
        "p->chunks = true;",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: words of pairs are not aligned where pixels begin at odd elements",
        PLAN,
        "pairs ? s.pad_w * s.c % 2 : 0;",
        "0;",
        tests=_STEM,
        variants=("asan",),
    ),
    Mutant(
        "stem: the padding that leads a kernel's row is not masked",
        KERNEL,
        "return {second, 0xffff0000u};",
        "return {second, 0xffffffffu};",
        tests=_NON_FINITE,
    ),
    Mutant(
        "stem: filters do not begin behind the padding that leads",
        KERNEL,
        "at = k - ky * p.row_depth - p.lead;",
        "at = k - ky * p.row_depth;",
        tests=_STEM,
    ),
    Mutant(
        "stem: the shared memory that is asked for is that of one patch",
        PLAN,
        "return 2 * buffer(",
        "return buffer(",
        tests=_STEM,
    ),
]
