"""What only CUDA's batch norm kernels have: packs of several elements, and a network's sizes."""

from __future__ import annotations

import pytest
import torch
from bn_operands import check_backward, check_forward, forward, laid_out
from cases import FORMATS, normal
from covering import cover

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(2, 64, 56, 56), (4, 256, 28, 28), (4, 2048, 7, 7)]


@pytest.mark.slow
@cover(fmt=list(FORMATS), shape=SIZES)
def test_sizes_of_resnet(simt, fmt, shape):
    check_forward(simt, torch.bfloat16, fmt, shape, training=True)
    check_backward(simt, torch.bfloat16, fmt, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "fmt", "packs"),
    [
        ((2, 16, 3, 3), "channels_last", True),
        ((2, 15, 4, 4), "channels_last", False),
        ((2, 15, 4, 4), "contiguous", True),
        ((2, 16, 3, 3), "contiguous", False),
        ((2, 1, 4, 4), "channels_last", True),
        ((2, 16, 1, 1), "contiguous", True),
    ],
)
def test_packs_wherever_they_fit(simt, dtype, shape, fmt, packs):
    (x,) = laid_out(fmt, normal(*shape, dtype=dtype))
    simt.launches()
    forward(simt, x, [None] * 4, training=True)
    names = [launch.kernel for launch in simt.launches()]
    assert len(names) == 3
    width = 16 // dtype.itemsize if packs else 1
    assert f", {width}>" in names[0]
    assert f", {width}>" in names[2]
