"""Bugs to plant in the patches of the stem's image; see :mod:`triton_mutants`."""

from __future__ import annotations

from mutant_of_triton import Mutant

PATCHES = "tests/triton_kernels/test_triton_conv_bn_relu_maxpool.py::test_patches[float16]"
NON_FINITE = PATCHES.replace("test_patches[float16]", "test_non_finite_values_in_a_patch")

MUTANTS = [
    Mutant(
        "a patch has the end of the row before it at its beginning",
        "_stem_patch.py",
        "((columns >= 0) & (columns < ROW))",
        "(columns < ROW)",
        PATCHES,
    ),
    Mutant(
        "a patch is read below the image",
        "_stem_patch.py",
        "(rows >= 0) & (rows < H) & valid",
        "(rows >= 0) & valid",
        PATCHES,
    ),
    Mutant(
        "a pixel's window begins where its patch does",
        "_stem_patch.py",
        "return x * C - (x * C >> 3) * 8",
        "return x * 0",
        PATCHES,
        quick=True,
    ),
    Mutant(
        "a row of taps follows the one before it in the patch",
        "_stem_patch.py",
        "k + k // (KW * C) * (PATCH_W - KW * C)",
        "k",
        PATCHES,
    ),
    Mutant(
        "what lies behind the depth is multiplied",
        "_stem_patch.py",
        "tl.where(k_valid[None, :], tl.reshape(a, (BLOCK_M, BLOCK_K)), 0.0)",
        "tl.reshape(a, (BLOCK_M, BLOCK_K))",
        NON_FINITE,
    ),
    Mutant(
        "a program computes its neighbours' tiles too",
        "_stem_kernels.py",
        "for tile in range(first, tiles, tl.num_programs(0)):",
        "for tile in range(first, tiles):",
        PATCHES,
    ),
    Mutant(
        "the patch that is loaded ahead is this tile's",
        "_stem_kernels.py",
        "_place(tile + tl.num_programs(0), tiles_y, tiles_x, TILE_H, TILE_W)",
        "_place(tile, tiles_y, tiles_x, TILE_H, TILE_W)",
        PATCHES,
    ),
    Mutant(
        "a row of the padded filters is as long as it was",
        "conv_bn_relu_maxpool.py",
        'sizes["w_stride"] = depth',
        'sizes["w_stride"] = s.depth',
        PATCHES,
    ),
    Mutant(
        "a dilated stem has the patch of one that isn't",
        "conv_bn_relu_maxpool.py",
        "s.dilation != (1, 1)",
        "s.groups != 1",
        PATCHES.replace("test_patches[float16]", "test_the_patch_under_a_tile"),
    ),
]
