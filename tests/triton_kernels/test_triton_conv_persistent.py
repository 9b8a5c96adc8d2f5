"""Persistent programs of Triton's convolution: the bits of a program for each tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Conv, normal
from conv_operands import Operands, with_affine_residual
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision, precisions
from shapes import channels_last, geometry, packed
from torch import Tensor

from fused_resnet.backends.triton import _conv_plan
from fused_resnet.backends.triton._conv_plan import ConvConfig
from fused_resnet.backends.triton._device import CPU

KINDS = {FLOAT16: "half", BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}

#: A small tile by kind, of which a multiprocessor holds two programs: eight on the interpreter's
#: device.
TILES = {
    "half": ConvConfig(64, 64, 64, 4, 4, persistent=True),
    "tf32": ConvConfig(64, 64, 32, 4, 4, persistent=True),
    "ieee": ConvConfig(64, 64, 16, 8, 3, more_registers=128, persistent=True),
}

#: By the number of tiles. 18 for 8 programs: two of them compute a third. They are 9 rows of 2, so
#: that the last group of rows is not whole, and neither is the last tile of a row or column. Of 16
#: each program computes two.
MATRICES = {
    18: Conv("ragged", (3, 72, 11, 17), 72, (1, 1)),
    16: Conv("whole", (2, 64, 16, 16), 128, (1, 1)),
}


def launched(interpreted, call) -> tuple[Any, Any]:
    """A call's results, and the launch of the convolution."""
    interpreted.launches()
    results = call()
    return results, interpreted.launches()[0]


def both(interpreted, tile: ConvConfig, call, programs: int, tiles: int) -> list[Tensor]:
    """The results of persistent programs, which are those of one for each tile, bit by bit."""
    found, launch = launched(interpreted, lambda: call(tile))
    expected, plain = launched(interpreted, lambda: call(tile._replace(persistent=False)))
    assert launch.grid == (programs, 1, 1)
    assert launch.constants["PERSISTENT"] is True
    assert plain.grid == (tiles, 1, 1)
    assert plain.constants["PERSISTENT"] is False
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    return found


def residual_call(interpreted, operands: Operands, affine: tuple[Any, Any]):
    return lambda config: [
        interpreted.ops.conv_bn_add_relu_packed(
            operands.x, packed(operands.weight), *operands.folded(), operands.residual,
            operands.weight.shape, *geometry(operands.case), True, residual_scale=affine[0],
            residual_shift=affine[1], config=config,
        )
    ]  # fmt: skip


@precisions
@pytest.mark.parametrize(("tiles", "descriptors"), [(18, True), (16, False)])
def test_a_residual(interpreted, precision: Precision, tiles: int, descriptors: bool) -> None:
    operands = Operands(MATRICES[tiles], precision)
    affine = torch.rand(operands.case.k) + 0.5, torch.randn(operands.case.k)
    tile = TILES[KINDS[precision]]._replace(descriptors=descriptors)
    with precision.set():
        call = residual_call(interpreted, operands, affine)
        (y,) = both(interpreted, tile, call, 8, tiles)
    precision.check(y, *with_affine_residual(operands, *affine))


@precisions
@pytest.mark.parametrize(("tiles", "prologue"), [(18, True), (18, False)])
def test_statistics(interpreted, precision: Precision, tiles: int, prologue: bool) -> None:
    """With and without a prologue: each row of tiles has its own place."""
    case, dtype = MATRICES[tiles], precision.dtype
    x = channels_last(normal(*case.x, dtype=dtype))
    w = channels_last(normal(case.k, case.x[1], 1, 1, dtype=dtype, scale=0.1))
    bn = (torch.rand(case.x[1]) + 0.5, torch.randn(case.x[1])) if prologue else (None, None)
    with precision.set():
        z, mean, var = both(
            interpreted,
            TILES[KINDS[precision]],
            lambda config: interpreted.ops.conv_forward(
                x, *bn, w, *geometry(case), True, False, config=config
            ),
            8,
            tiles,
        )
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("precision", "tile"),
    [
        pytest.param(p, c, id=f"{p}-{'x'.join(map(str, c[:3]))}")
        for p in (BFLOAT16, TF32)
        for c in _conv_plan.PERSISTENT[KINDS[p]]
    ],
)
def test_every_tile_of_the_table(interpreted, precision: Precision, tile: ConvConfig) -> None:
    operands = Operands(MATRICES[18], precision)
    rows, columns = -(-561 // tile.block_m), -(-72 // tile.block_n)
    programs = CPU.processors * _conv_plan.resident(tile, CPU, KINDS[precision])
    with precision.set():
        call = residual_call(interpreted, operands, (None, None))
        (y,) = both(interpreted, tile, call, programs, rows * columns)
    precision.check(y, *with_affine_residual(operands, *(torch.ones(72), torch.zeros(72))))


@pytest.mark.parametrize("seed", [1, 2])
def test_programs_in_any_order(interpreted, interpreter, seed: int) -> None:
    operands = Operands(MATRICES[18], BFLOAT16)
    call = residual_call(interpreted, operands, (None, None))
    (expected,) = call(TILES["half"])
    interpreter.seed = seed
    (found,) = call(TILES["half"])
    assert torch.equal(found, expected)
