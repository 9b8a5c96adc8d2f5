"""What only Triton's stem has: every configuration of its tiles, and patches of the image."""

from __future__ import annotations

import pytest
import torch
from cases import Conv
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, precisions
from shapes import RESNET, STEMS, geometry
from stem_operands import Operands, check

from fused_resnet.backends.triton._conv_plan import precision_of
from fused_resnet.backends.triton._conv_shape import conv_shape
from fused_resnet.backends.triton.conv_bn_relu_maxpool import CONFIGS, Pool, patch_of, tile_of

KINDS = {FLOAT16: "half", BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}


def configurations() -> list:
    found = []
    for precision in (BFLOAT16, TF32, FLOAT32):
        with precision.set():
            table = CONFIGS[precision_of(torch.empty(0, dtype=precision.dtype))]
        found += [
            pytest.param(precision, config, id=f"{precision}-{i}") for i, config in enumerate(table)
        ]
    return found


@pytest.mark.parametrize(("precision", "config"), configurations())
@pytest.mark.parametrize("case", [STEMS[1], STEMS[5]], ids=str)
def test_every_configuration(interpreted, precision, config, case):
    check(interpreted, case, precision, config=config)


#: Rows and elements of a row of the patch under a tile of 128 rows of the GEMM, as powers of two.
PATCHES = [
    # 8 x 3 pooled pixels of 17 x 7, under which lie 39 x 19 pixels of 3 channels.
    (Conv("resnet", (1, 3, 224, 224), 64, (7, 7), RESNET), (64, 64)),
    # 7 x 3 pooled pixels of 15 x 7, under which lie 17 x 9.
    (STEMS[4], (32, 64)),
    (STEMS[5], (0, 0)),  # dilated
    (STEMS[7], (0, 0)),  # 32 channels: too large
]


@pytest.mark.parametrize(("case", "patch"), PATCHES, ids=lambda v: str(v))
def test_the_patch_under_a_tile(case, patch):
    x = torch.empty(case.x, dtype=torch.bfloat16, device="meta")
    s = conv_shape("", x, (case.k, case.x[1], *case.kernel), *geometry(case))
    pool = Pool((3, 3), (2, 2), (1, 1))
    tile = tile_of(CONFIGS["half"][0], pool, pool.size(s))
    assert patch_of(s, pool, tile) == patch


#: 5 images of 4 tiles each, of 3 x 4 pooled pixels, whose rows are six chunks of 16 elements: on
#: the 4 multiprocessors of the interpreter, 5 tiles for a program.
CHUNKS = Conv("chunks", (5, 3, 23, 32), 20, (7, 7), RESNET)


@precisions
def test_patches(interpreted, precision):
    stem = Operands(CHUNKS, precision)
    result = stem.run(interpreted, config=CONFIGS[KINDS[precision]][-1])
    precision.check(result, *stem.eager_and_truth({}))
    (launch,) = interpreted.launches()
    assert launch.grid[0] == 4
    assert launch.constants["PATCH_H"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_in_a_patch(interpreted, value):
    """They come to what they lie under alone.

    Terms behind the depth are taken from a patch's beginning: (7, 10) for the last tile.
    """
    stem = Operands(CHUNKS, FLOAT16, bias=False)
    for y, x in ((0, 0), (7, 10), (22, 31), (8, 31)):
        stem.x[1, :, y, x] = value
    _, truth = stem.eager_and_truth({})
    result = stem.run(interpreted, config=CONFIGS["half"][-1])
    torch.testing.assert_close(result.double(), truth, rtol=4e-3, atol=4e-3, equal_nan=True)


def test_rows_without_chunks_and_odd_addresses_have_no_patch(interpreted):
    """And the same bits as those with one."""
    stem = Operands(CHUNKS, FLOAT16)
    n, c, h, w = CHUNKS.x
    flat = torch.zeros(stem.x.numel() + 1, dtype=torch.float16)[1:]
    x = flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(stem.x)
    results = [stem.run(interpreted), stem.run(interpreted, x=x)]
    assert torch.equal(*results)
    stem = Operands(STEMS[3], FLOAT16)
    stem.run(interpreted)
    rows = [launch.constants["PATCH_H"] for launch in interpreted.launches()]
    assert rows[0] > 0
    assert rows[1:] == [0, 0]
