"""What only CUDA's convolution has: every tile with and without a split, and the host's plan."""

from __future__ import annotations

import pytest
import torch
from cases import Conv, batch_norm
from conv_operands import EPS, Operands, with_affine_residual
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, half_precisions, precisions
from shapes import AWKWARD, PLANNED, geometry, packed
from tolerances import TOLERANCES
from torch import Tensor

TILES = {0: "Tile<128, 128", 1: "Tile<128, 64", 2: "Tile<64, 64"}


def run_planned(simt, operands: Operands, tile: int, split_k: int, affine=(None, None)) -> Tensor:
    with operands.precision.set():
        return simt.ops.conv_bn_add_relu_planned(
            operands.x,
            packed(operands.weight),
            *operands.folded(),
            operands.residual,
            *affine,
            operands.weight.shape,
            *geometry(operands.case),
            True,
            tile,
            split_k,
        )


@precisions
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_plan(simt, precision, tile, split_k):
    operands = Operands(PLANNED, precision)
    result = run_planned(simt, operands, tile, split_k)
    precision.check(result, operands.eager(), operands.truth())
    kernels = [launch.kernel for launch in simt.launches()]
    assert TILES[tile] in kernels[0]
    assert len(kernels) == (1 if split_k == 1 else 2)


@pytest.mark.variants
@precisions
@pytest.mark.parametrize("case", AWKWARD[:4], ids=str)
def test_split_of_awkward_shapes(simt, precision, case):
    """More parts than steps too: the last ones add nothing."""
    operands = Operands(case, precision)
    result = run_planned(simt, operands, 2, 5)
    precision.check(result, operands.eager(), operands.truth())


@pytest.mark.variants
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT32], ids=str)
def test_large_tiles_in_every_build(simt, precision, tile):
    operands = Operands(Conv("pipeline", (1, 40, 5, 5), 72, args={"padding": 1}), precision)
    result = run_planned(simt, operands, tile, 1)
    precision.check(result, operands.eager(), operands.truth())


@pytest.mark.variants
@pytest.mark.parametrize("channels", [8, 40])
@pytest.mark.parametrize("tile", [0, 1, 2])
@pytest.mark.parametrize("precision", [BFLOAT16, TF32, FLOAT32], ids=str)
def test_a_residual_behind_a_short_sum(simt, precision, tile, channels):
    """Fewer steps than the pipeline has stages: the residual is fetched before the first one."""
    operands = Operands(Conv("short", (1, channels, 13, 11), 72, (1, 1)), precision)
    result = run_planned(simt, operands, tile, 1)
    precision.check(result, operands.eager(), operands.truth())


@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT32], ids=str)
def test_the_host_plans_small_tiles_and_splits_for_small_maps(simt, precision):
    """For the eight multiprocessors that the simulator says it has."""
    deep = Operands(Conv("deep", (1, 512, 3, 3), 64, args={"padding": 1}), precision)
    precision.check(deep.run(simt), deep.eager(), deep.truth())
    conv, finish = simt.launches()
    assert "Tile<64, 64" in conv.kernel
    assert conv.grid[1] > 1
    assert "conv_split_finish_kernel" in finish.kernel
    wide = Operands(Conv("wide", (1, 64, 64, 64), 128, (1, 1)), precision)
    precision.check(wide.run(simt), wide.eager(), wide.truth())
    (conv,) = simt.launches()
    assert "Tile<128, 128" in conv.kernel


@precisions
@pytest.mark.parametrize("case", [AWKWARD[0], AWKWARD[1]], ids=str)
def test_residual_with_an_affine_step_of_its_own(simt, precision, case):
    """Two convolutions that meet, each behind a batch norm."""
    operands = Operands(case, precision)
    affine = torch.rand(case.k) + 0.5, torch.randn(case.k)
    result = run_planned(simt, operands, 2, 1, affine)
    precision.check(result, *with_affine_residual(operands, *affine))


def test_a_tile_that_is_not_there_is_refused(simt):
    operands = Operands(AWKWARD[0], FLOAT16)
    with pytest.raises(ValueError, match="conv_bn_add_relu_planned: tile: expected -1 to 2, got 3"):
        run_planned(simt, operands, 3, 1)


@half_precisions
def test_taps_far_from_the_first_one(simt, precision):
    """A window that begins 2^20 rows above the map: 2^32 elements from its first tap to its second.

    The map has one row of 4096 channels; one tap of each of the two windows lies inside.
    """
    far = 2**20
    args = {"padding": (far, 0), "dilation": (far, 1), "stride": (far, 1)}
    operands = Operands(Conv("far", (1, 4096, 1, 1), 8, (2, 1), args=args), precision)
    x, weight = operands.x[0, :, 0, 0].double(), operands.weight[..., 0].double()
    z = torch.stack([weight[..., 1] @ x, weight[..., 0] @ x], -1)
    gamma, beta, mean, var = (t.double()[:, None] for t in operands.bn)
    y = gamma * (z + operands.bias.double()[:, None] - mean) / torch.sqrt(var + EPS) + beta
    truth = (y + operands.residual[0, ..., 0].double()).relu()
    result = operands.run(simt)[0, ..., 0]
    rtol, atol = TOLERANCES[precision.dtype]
    torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=atol)


def test_sizes_beyond_32_bits_are_refused(simt):
    x, weight = torch.randn(1, 8, 1, 1), torch.randn(8, 8, 1, 1)
    bn = batch_norm(8, torch.float32)
    with pytest.raises(ValueError, match="padding: expected a padded map of less than 2"):
        simt.ops.conv_bn_add_relu(
            x, weight, None, *bn, None, (2**29, 1), (2**29, 0), (1, 1), 1, EPS, True
        )
