"""Frozen residual blocks on Triton's kernels, in the hardened interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from precisions import PRECISIONS, half_precisions, precisions
from test_conv_bn_add_relu import channels_last
from test_residual_block import Block

CHAIN, ON_CHIP = "conv_bn_add_relu_kernel", "residual_block_kernel"


def check(interpreted, block: Block, x: torch.Tensor, join: bool = False) -> list[str]:
    """The kernels that ran, without those that finish a split."""
    result = block.run(interpreted, x, join)
    block.precision.check(result, block.plain(x, exact=False), block.plain(x, exact=True))
    assert result.is_contiguous(memory_format=torch.channels_last)
    names = [launch.kernel for launch in interpreted.launches()]
    return [name for name in names if name != "conv_split_finish_kernel"]


@half_precisions
@pytest.mark.parametrize("middle", [64, 128])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_middle_stays_on_chip(interpreted, precision, middle, stride):
    """Of ResNet's stages 1 and 2; more pixels than one tile has, and no multiple of it."""
    block = Block(precision, 32, [middle, middle, 4 * middle], stride, shortcut=True)
    x = channels_last(normal(1, 32, 13, 11, dtype=precision.dtype))
    assert check(interpreted, block, x) == [CHAIN, CHAIN, ON_CHIP]


@half_precisions
@pytest.mark.parametrize("middle", [64, 128])
def test_one_tile_on_chip(interpreted, precision, middle):
    """The last part of the output's channels is not a whole tile."""
    block = Block(precision, 72, [middle, middle, 72], 1, shortcut=False)
    x = channels_last(normal(1, 72, 3, 3, dtype=precision.dtype))
    assert check(interpreted, block, x) == [CHAIN, ON_CHIP]


@precisions
@pytest.mark.parametrize("widths", [[16, 24, 40], [16, 40], [6, 5, 7]], ids=str)
def test_other_blocks_are_chains(interpreted, precision, widths):
    block = Block(precision, 24, widths, 2, shortcut=True)
    x = channels_last(normal(1, 24, 7, 6, dtype=precision.dtype))
    assert check(interpreted, block, x) == [CHAIN] * (len(widths) + 1)


@precisions
@pytest.mark.parametrize("widths", [[16, 24, 40], [16, 40]], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_in_the_same_sum(interpreted, precision, widths, stride):
    block = Block(precision, 24, widths, stride, shortcut=True)
    x = channels_last(normal(1, 24, 7, 6, dtype=precision.dtype))
    result = block.run(interpreted, x, join=True)
    names = [launch.kernel for launch in interpreted.launches()]
    assert names.count(CHAIN) == len(widths)
    # The truth is that of the weights as they are joined: scales are in them, rounded once.
    own = len(widths)
    for weight, scale in zip(block.weights[own - 1 :], block.scale[own - 1 :], strict=True):
        weight.copy_(weight.double() * scale.double().view(-1, 1, 1, 1))
        scale.fill_(1)
    precision.check(result, block.plain(x, exact=False), block.plain(x, exact=True))


@half_precisions
def test_identity(interpreted, precision):
    block = Block(precision, 40, [16, 24, 40], 1, shortcut=False)
    check(interpreted, block, channels_last(normal(2, 40, 5, 5, dtype=precision.dtype)))


def test_non_finite_values_pass_through(interpreted):
    block = Block(PRECISIONS[1], 64, [64, 64, 64], 1, shortcut=False)
    x = channels_last(normal(1, 64, 6, 6, dtype=torch.bfloat16))
    x[0, 5, 2, 3] = float("nan")
    result, truth = block.run(interpreted, x), block.plain(x, exact=True)
    assert torch.equal(result.isnan(), truth.isnan())
    assert not result.isnan().all()


def test_empty_batch(interpreted):
    for widths in ([64, 64, 32], [16, 32]):
        block = Block(PRECISIONS[0], 32, widths, 1, shortcut=False)
        y = block.run(interpreted, torch.empty(0, 32, 5, 5).half())
        assert y.shape == (0, 32, 5, 5)
    assert interpreted.launches() == []


def test_the_same_bits_in_any_order_of_programs(interpreted):
    block = Block(PRECISIONS[1], 32, [64, 64, 256], 1, shortcut=True)
    x = channels_last(normal(1, 32, 13, 11, dtype=torch.bfloat16))
    results = []
    for seed in (0, 1, 2):
        interpreted.seed(seed)
        results.append(block.run(interpreted, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_operands_are_named(interpreted):
    block = Block(PRECISIONS[0], 24, [16, 24, 40], 2, shortcut=True)
    for things in (block.weights, block.scale, block.shift):
        things.pop()
    x = channels_last(normal(1, 24, 7, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="residual: expected shape"):
        block.run(interpreted, x)
    block.weights.pop()
    with pytest.raises(ValueError, match="residual_block: packed: expected 3 or 4 tensors, got 2"):
        block.run(interpreted, x)
