"""Frozen residual blocks on CUDA's kernels, executed on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from precisions import Precision, half_precisions, precisions
from test_conv_bn_add_relu import channels_last, packed
from tolerances import error
from torch import Tensor


class Block:
    """Random weights, scales and shifts of a block; the block in plain PyTorch."""

    def __init__(
        self, precision: Precision, channels: int, widths: list[int], stride: int, shortcut: bool
    ) -> None:
        self.precision, self.stride = precision, stride
        self.bottleneck = len(widths) == 3
        sizes = [1, 3, 1] if self.bottleneck else [3, 3]
        strides = [1, stride, 1] if self.bottleneck else [stride, 1]
        ins = [channels, *widths[:-1]]
        if shortcut:
            sizes, strides = [*sizes, 1], [*strides, stride]
            ins, widths = [*ins, channels], [*widths, widths[-1]]
        self.sizes, self.strides, self.shortcut = sizes, strides, shortcut
        self.weights = [
            normal(k, c, s, s, dtype=precision.dtype, scale=(c * s * s) ** -0.5)
            for k, c, s in zip(widths, ins, sizes, strict=True)
        ]
        self.scale = [torch.rand(k) + 0.5 for k in widths]
        self.shift = [torch.randn(k) * 0.1 for k in widths]

    def plain(self, x: Tensor, exact: bool) -> Tensor:
        """In float64 with what is between the convolutions rounded as storage rounds it, or eager.

        Each kernel rounds its result once. Left unrounded, the truth would be no nearer to one
        implementation than to the other.
        """
        dtype = self.precision.dtype

        def conv(h: Tensor, i: int, residual: Tensor | None, relu: bool) -> Tensor:
            weight = self.weights[i]
            if exact:
                h, weight = self.precision.operand(h.to(dtype)), self.precision.operand(weight)
            z = F.conv2d(h, weight, None, self.strides[i], self.sizes[i] // 2)
            z = z * self.scale[i].to(z.dtype).view(-1, 1, 1) + self.shift[i].to(z.dtype).view(
                -1, 1, 1
            )
            z = z if residual is None else z + residual.to(z.dtype)
            return z.relu() if relu else z

        own = 3 if self.bottleneck else 2
        residual = conv(x, own, None, False) if self.shortcut else x
        h = x
        for i in range(own - 1):
            h = conv(h, i, None, True)
        return conv(h, own - 1, residual, True)

    def joined(self) -> tuple[Tensor, Tensor]:
        parts = [
            (w.double() * s.double().view(-1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1)
            for w, s in zip(self.weights[-2:], self.scale[-2:], strict=True)
        ]
        return torch.cat(parts, 1).to(self.precision.dtype).flatten(), sum(self.shift[-2:])

    def join_scales(self) -> None:
        """Makes the truth that of the weights as they are joined: scales in them, rounded once."""
        for weight, scale in zip(self.weights[-2:], self.scale[-2:], strict=True):
            weight.copy_(weight.double() * scale.double().view(-1, 1, 1, 1))
            scale.fill_(1)

    def check(self, result: Tensor, x: Tensor) -> None:
        truth = self.plain(x, exact=True)
        if self.precision.tf32:
            # What is between the convolutions differs in the last place of float32, which now and
            # then rounds to another tf32.
            assert error(result, truth) < 2e-5
        else:
            self.precision.check(result, self.plain(x, exact=False), truth)

    def run(self, simt, x: Tensor, join: bool = False) -> Tensor:
        joined = self.joined() if join else (None, None)
        with self.precision.set():
            return simt.ops.residual_block(
                x,
                [packed(w) for w in self.weights],
                self.scale,
                self.shift,
                *joined,
                self.bottleneck,
                self.stride,
                1,
                1,
                False,
            )


def check(simt, block: Block, x: Tensor, join: bool = False) -> list[str]:
    """The kernels that ran."""
    result = block.run(simt, x, join)
    block.check(result, x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    return [launch.kernel for launch in simt.launches()]


@half_precisions
@pytest.mark.parametrize("middle", [64, 128])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_middle_stays_on_chip(simt, precision, middle, stride):
    """Of ResNet's stages 1 and 2; more pixels than one tile has, and no multiple of it."""
    block = Block(precision, 32, [middle, middle, 4 * middle], stride, shortcut=True)
    x = channels_last(normal(1, 32, 13, 11, dtype=precision.dtype))
    kernels = check(simt, block, x)
    assert len(kernels) == 3
    assert "residual_block_kernel" in kernels[-1]


@pytest.mark.variants
@half_precisions
@pytest.mark.parametrize("middle", [64, 128])
def test_one_tile_on_chip(simt, precision, middle):
    """The last part of the output's channels is not a whole tile."""
    block = Block(precision, 72, [middle, middle, 72], 1, shortcut=False)
    kernels = check(simt, block, channels_last(normal(1, 72, 3, 3, dtype=precision.dtype)))
    assert "residual_block_kernel" in kernels[-1]


@precisions
@pytest.mark.parametrize("widths", [[16, 24, 40], [16, 40], [6, 5, 7]], ids=str)
def test_other_blocks_are_chains(simt, precision, widths):
    block = Block(precision, 24, widths, 2, shortcut=True)
    kernels = check(simt, block, channels_last(normal(1, 24, 7, 6, dtype=precision.dtype)))
    assert len(kernels) == len(widths) + 1
    assert all("conv_bn_add_relu_kernel" in kernel for kernel in kernels)


@pytest.mark.variants
@precisions
@pytest.mark.parametrize("widths", [[16, 24, 40], [16, 40]], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_in_the_same_sum(simt, precision, widths, stride):
    block = Block(precision, 24, widths, stride, shortcut=True)
    x = channels_last(normal(1, 24, 7, 6, dtype=precision.dtype))
    result = block.run(simt, x, join=True)
    kernels = [launch.kernel for launch in simt.launches()]
    assert len(kernels) == len(widths)
    block.join_scales()
    block.check(result, x)


@precisions
@pytest.mark.parametrize("widths", [[8, 12, 20], [10, 18]], ids=str)
def test_a_shortcut_that_fills_no_packs_runs_by_itself(simt, precision, widths):
    """Also with the joined weights there: 10 channels are no multiple of 16 bytes in any dtype."""
    block = Block(precision, 10, widths, 2, shortcut=True)
    x = channels_last(normal(1, 10, 7, 6, dtype=precision.dtype))
    result = block.run(simt, x, join=True)
    assert len(simt.launches()) == len(widths) + 1
    block.check(result, x)


@precisions
@pytest.mark.parametrize(("width", "tile"), [(128, "Tile<128, 128"), (64, "Tile<128, 64")])
def test_the_shortcut_in_large_tiles(simt, precision, width, tile):
    """A map that is large for the simulator's few multiprocessors."""
    block = Block(precision, 16, [16, 16, width], 1, shortcut=True)
    x = channels_last(normal(1, 16, 64, 64, dtype=precision.dtype))
    result = block.run(simt, x, join=True)
    assert tile in simt.launches()[-1].kernel
    block.join_scales()
    block.check(result, x)


@half_precisions
def test_identity(simt, precision):
    block = Block(precision, 40, [16, 24, 40], 1, shortcut=False)
    check(simt, block, channels_last(normal(2, 40, 5, 5, dtype=precision.dtype)))


def test_wrong_operands_are_named(simt):
    block = Block(Precision("float16", torch.float16), 24, [16, 24, 40], 2, shortcut=True)
    block.weights.pop()
    block.scale.pop()
    block.shift.pop()
    x = channels_last(normal(1, 24, 7, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="residual: expected shape"):
        block.run(simt, x)
    block.weights.pop()
    with pytest.raises(ValueError, match="residual_block: packed: expected 3 or 4 tensors, got 2"):
        block.run(simt, x)
