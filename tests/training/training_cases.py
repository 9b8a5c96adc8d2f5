"""Operands and float64 truths of the training primitives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from cases import CONVS, Conv, normal
from torch import Tensor
from torch.nn import functional

#: Shapes that kernels of their own take, beside those of every convolution's tests.
TRAINED = [
    *CONVS,
    # One vector of 16 channels, as in CIFAR's networks; several blocks of pixels, one not full.
    Conv("cifar-1x1", (3, 16, 33, 31), 48, (1, 1)),
    # More than a panel of 32 and less than two; a block's last tile has one row.
    Conv("1x1-blocks", (1, 32, 25, 25), 80, (1, 1)),
    Conv("1x1-deep", (2, 1024, 5, 7), 16, (1, 1)),
    # Results in two ranges of the weight gradient's blocks, the second one short.
    Conv("1x1-many-results", (2, 32, 9, 7), 592, (1, 1)),
    # The last row and column of the input belong to no output pixel, or do.
    Conv("1x1-stride2-even", (2, 48, 14, 12), 64, (1, 1), {"stride": 2}),
    Conv("1x1-stride2-odd", (2, 64, 15, 13), 48, (1, 1), {"stride": 2}),
    Conv("3x3-stride2-even", (2, 32, 16, 12), 48, args={"stride": 2, "padding": 1}),
    Conv("3x3-stride2-odd-wide", (1, 48, 15, 13), 64, args={"stride": 2, "padding": 1}),
    Conv("3x3-stride2-many", (3, 16, 56, 31), 32, args={"stride": 2, "padding": 1}),
    # Whole vectors of pairs in both directions, and an odd number of pixels in a block.
    Conv("1x1-pairs", (1, 64, 25, 25), 96, (1, 1)),
    Conv("1x1-stride2-pairs", (3, 32, 15, 13), 64, (1, 1), {"stride": 2}),
    # So many channels that the data gradient is not left to PyTorch.
    Conv("3x3-stride2-wide", (2, 256, 9, 7), 32, args={"stride": 2, "padding": 1}),
    Conv("cifar-3x3", (2, 16, 33, 31), 16, args={"padding": 1}),
    # Few channels: as of an image; a row of more pixels than one chain, three vectors of results.
    Conv("image-7x7", (2, 3, 24, 27), 16, (7, 7), {"stride": 2, "padding": 3}),
    Conv("image-wide", (1, 4, 12, 140), 48, (1, 4), {"padding": (0, 2)}),
    Conv("groups-of-4", (2, 64, 9, 11), 64, args={"padding": 1, "groups": 16}),
    Conv("3x3-panels", (1, 48, 13, 11), 80, args={"padding": 1}),
]

#: Whose results are stored past the caches, whose gradients are, and one of both.
LARGE_RESULT = Conv("1x1", (1, 16, 288, 289), 64, (1, 1))
LARGE_GRADIENTS = [
    Conv("1x1", (1, 64, 288, 289), 16, (1, 1)),
    Conv("1x1-stride2", (1, 64, 288, 289), 16, (1, 1), {"stride": 2}),
]
LARGE_MAPS = Conv("3x3", (1, 64, 288, 289), 64, args={"padding": 1})


def geometry(case: Conv) -> dict[str, Any]:
    """The operator's arguments behind the tensors."""

    def pair(name: str, default: int) -> list[int]:
        value = case.args.get(name, default)
        return list(value) if isinstance(value, tuple) else [value, value]

    return {
        "stride": pair("stride", 1),
        "padding": pair("padding", 0),
        "dilation": pair("dilation", 1),
        "groups": case.args.get("groups", 1),
    }


def vectors_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of vectors per channel."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def coarse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Eighths, which every dtype holds exactly: ReLU then decides alike in all of them."""
    return ((torch.randn(*shape, dtype=torch.float64) * 8).round() / 8).to(dtype)


def widened(arguments: Iterable[Any]) -> list[Any]:
    """The arguments of an operator with its tensors in float64."""
    return [v.double() if isinstance(v, Tensor) else v for v in arguments]


class Affine(NamedTuple):
    """Scale, shift and mean of a batch norm, per channel."""

    scale: Tensor
    shift: Tensor
    mean: Tensor

    def double(self) -> Affine:
        return Affine(*(t.double() for t in self))


def affine(channels: int, dtype: torch.dtype) -> Affine:
    """Exact in every dtype, as are their products with ``coarse`` numbers."""
    scale = torch.randint(1, 4, (channels,)) / 2 * (1 - 2 * (torch.arange(channels) % 5 == 4).int())
    shift = torch.randint(-4, 5, (channels,)) / 8
    mean = torch.randint(-4, 5, (channels,)) / 8
    return Affine(*(t.to(vectors_of(dtype)) for t in (scale, shift, mean)))


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def channel_sum(x: Tensor) -> Tensor:
    return x.double().sum((0, 2, 3))


def weight_of(case: Conv, dtype: torch.dtype) -> Tensor:
    groups = case.args.get("groups", 1)
    depth = case.x[1] // groups * case.kernel[0] * case.kernel[1]
    w = normal(case.k, case.x[1] // groups, *case.kernel, dtype=dtype, scale=depth**-0.5)
    return w.contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, w: Tensor, bn: Affine | None, **args: Any) -> Tensor:
    """conv(p(x), w) in the operands' own dtype."""
    if bn is not None:
        x = functional.relu(x * per_channel(bn.scale.to(x)) + per_channel(bn.shift.to(x)))
    return functional.conv2d(x, w, None, **args)


class Gradients(NamedTuple):
    """What conv_backward returns."""

    g_x: Tensor
    dw: Tensor
    sum_g: Tensor
    sum_g_xc: Tensor


class Backward(NamedTuple):
    """The operands of conv_backward."""

    g: Tensor
    z: Tensor | None
    a: Tensor
    b: Tensor | None
    c: Tensor | None
    x: Tensor
    bn: Affine | None
    w: Tensor
    add: Tensor | None

    def to(self, dtype: torch.dtype) -> Backward:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        bn = None if self.bn is None else Affine(*(t.to(dtype) for t in self.bn))
        moved = [move(t) for t in (self.g, self.z, self.a, self.b, self.c, self.x)]
        return Backward(*moved, bn, move(self.w), move(self.add))  # type: ignore[arg-type]

    def plain(self, **args: Any) -> Gradients:
        """By PyTorch's own operators, in the operands' dtype."""
        dz = per_channel(self.a.to(self.g)) * self.g
        if self.z is not None:
            dz = dz + (per_channel(self.b.to(self.z)) * self.z + per_channel(self.c.to(self.z)))
        p, live = self.x, None
        if self.bn is not None:
            v = self.x * per_channel(self.bn.scale.to(p)) + per_channel(self.bn.shift.to(p))
            p, live = functional.relu(v), v > 0
        g_x, dw, _ = torch.ops.aten.convolution_backward(
            dz, p, self.w, None, args["stride"], args["padding"], args["dilation"], False, [0, 0],
            args["groups"], [True, True, False],
        )  # fmt: skip
        if live is not None:
            g_x = g_x * live
        if self.add is not None:
            g_x = g_x + self.add
        mean = 0 if self.bn is None else per_channel(self.bn.mean.double())
        return Gradients(g_x, dw, channel_sum(g_x), channel_sum(g_x.double() * (self.x - mean)))

    def run(self, winograd: bool = False, need: tuple[bool, bool] = (True, True), **args: Any):
        scale, shift, mean = self.bn or (None, None, None)
        return Gradients(*torch.ops.fused_resnet.conv_backward(
            self.g, self.z, self.a, self.b, self.c, self.x, scale, shift, mean, self.w, self.add,
            *args.values(), *need, self.bn is not None, winograd,
        ))  # fmt: skip


def backward_of(case: Conv, dtype: torch.dtype, kind: str) -> Backward:
    """``kind``: ``prologue``, ``add``, or ``frozen``, with statistics that are given."""
    w = weight_of(case, dtype)
    x = coarse(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    z = torch.empty_like(convolve(x, w, None, **geometry(case)))
    g, z = coarse(*z.shape, dtype=dtype), coarse(*z.shape, dtype=dtype)
    g, z = (t.contiguous(memory_format=torch.channels_last) for t in (g, z))
    a, b, c = affine(case.k, dtype)
    bn = affine(case.x[1], dtype) if kind == "prologue" else None
    add = coarse(*case.x, dtype=dtype) if kind == "add" else None
    if kind == "frozen":
        return Backward(g, None, a, None, None, x, bn, w, add)
    return Backward(g, z, a, b / 4, c / 4, x, bn, w, add)
