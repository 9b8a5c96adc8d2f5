"""Frozen residual blocks against float64, by :func:`fused_resnet.ops.residual_block`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.availability import resolve_backend
from .operands import BATCH_NORM, Draw, Inputs, Subject, folded


class Conv(NamedTuple):
    """One convolution of a block.

    Attributes:
        prefix: What the names of its arguments begin with, for example ``conv1``.
        weight: Shape of its filters, ``(K, C, kh, kw)``.
        stride: Its stride, in both directions.
    """

    prefix: str
    weight: tuple[int, int, int, int]
    stride: int


@dataclass(frozen=True)
class BlockCase:
    """One block; the name says what it covers.

    Attributes:
        name: Name of the case.
        x: Shape of the input.
        widths: Output channels of its convolutions: two of 3x3, or 1x1, 3x3 and 1x1.
        stride: Stride of the block.
        shortcut: Whether its shortcut is a 1x1 convolution, not the identity.
        concatenated: Whether the last convolution and the shortcut's are one GEMM over concatenated
            channels, on backends that support it.
    """

    name: str
    x: tuple[int, int, int, int]
    widths: tuple[int, ...]
    stride: int = 1
    shortcut: bool = False
    concatenated: bool = False

    @property
    def bottleneck(self) -> bool:
        """Whether it is a bottleneck, not a basic block."""
        return len(self.widths) == 3

    def convs(self) -> Iterator[Conv]:
        """The convolutions in order; the shortcut's is the last."""
        channels, strided = self.x[1], 1 if self.bottleneck else 0
        for i, k in enumerate(self.widths):
            size = 1 if self.bottleneck and i != 1 else 3
            stride = self.stride if i == strided else 1
            yield Conv(f"conv{i + 1}", (k, channels, size, size), stride)
            channels = k
        if self.shortcut:
            yield Conv("shortcut", (channels, self.x[1], 1, 1), self.stride)


CASES = (
    BlockCase("basic", (2, 64, 8, 7), (64, 64)),
    BlockCase("basic/2, shortcut", (1, 24, 9, 8), (40, 40), 2, shortcut=True, concatenated=True),
    BlockCase("bottleneck of 64, on chip on a GPU", (1, 128, 7, 6), (64, 64, 128)),
    BlockCase("bottleneck of 64, shortcut", (1, 32, 7, 6), (64, 64, 128), shortcut=True),
    BlockCase(
        "bottleneck/2, shortcut", (1, 24, 7, 6), (16, 24, 40), 2, shortcut=True, concatenated=True
    ),
    BlockCase("bottleneck of odd channels", (1, 21, 7, 6), (17, 19, 21)),
)


def subjects() -> Iterator[Subject]:
    """The cases."""
    for block in CASES:
        yield Subject(
            block.name, partial(_unfused, block), partial(_fused, block), partial(_inputs, block)
        )


def _inputs(block: BlockCase, draw: Draw) -> Inputs:
    inputs = {"x": draw.feature_map(*block.x, mean=0.3)}
    for conv in block.convs():
        inputs[f"{conv.prefix}.weight"] = draw.conv_weight(*conv.weight)
        for name, vector in draw.batch_norm(conv.weight[0]).items():
            inputs[f"{conv.prefix}.{name}"] = vector
    return inputs


def _batch_norm(conv: Conv, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, mean, var = (inputs[f"{conv.prefix}.{name}"] for name in BATCH_NORM)
    return weight, bias, mean, var


def _unfused(block: BlockCase, **inputs: Tensor) -> Tensor:
    """The block as an unfused model computes it."""

    def run(conv: Conv, h: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        return reference.conv_bn_add_relu(
            h,
            inputs[f"{conv.prefix}.weight"],
            *_batch_norm(conv, inputs),
            residual,
            stride=conv.stride,
            padding=conv.weight[2] // 2,
            relu=relu,
        )

    convs = list(block.convs())
    h = residual = inputs["x"]
    if block.shortcut:
        residual = run(convs.pop(), h, None, relu=False)
    for conv in convs[:-1]:
        h = run(conv, h, None, relu=True)
    return run(convs[-1], h, residual, relu=True)


def _fused(block: BlockCase, **inputs: Tensor) -> Tensor:
    """Fold and pack like ``freeze``, then call the operation."""
    x, convs = inputs["x"], list(block.convs())
    packed = [ops.pack_conv_weight(inputs[f"{conv.prefix}.weight"]) for conv in convs]
    affine = [folded(x.dtype, *_batch_norm(conv, inputs)) for conv in convs]
    scale, shift = [a[0] for a in affine], [a[1] for a in affine]
    concatenated = concatenated_shift = None
    if block.concatenated and resolve_backend("residual_block", x) in ("cuda", "triton"):
        scaled = [
            p.double().view(s.numel(), -1) * s.double().view(-1, 1)
            for p, s in zip(packed[-2:], scale[-2:], strict=True)
        ]
        concatenated = torch.cat(scaled, 1).to(packed[-1].dtype).flatten()
        concatenated_shift = shift[-2] + shift[-1]
    return ops.residual_block(
        x,
        packed,
        scale,
        shift,
        concatenated=concatenated,
        concatenated_shift=concatenated_shift,
        bottleneck=block.bottleneck,
        stride=block.stride,
    )
