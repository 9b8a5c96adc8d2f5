"""Flop formulas, so that ``torch.utils.flop_counter.FlopCounterMode`` counts the fused operators.

As in PyTorch's own formulas a multiply-add counts as two operations, a convolution counts by its
definition whatever algorithm computes it. Batch norm, ReLU, additions and pooling count nothing.
A formula gets the operator's arguments with each tensor replaced by its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch

from .program_shapes import program_shapes
from .when_imported import when_imported

Shape = Sequence[int]

#: By the name of the operator, in whatever library it is.
FORMULAS: dict[str, Callable[..., int]] = {}


def _formula(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def enter(function: Callable[..., int]) -> Callable[..., int]:
        FORMULAS[name] = function
        return function

    return enter


def register(namespace: str, formulas: Mapping[str, Callable[..., int]] = FORMULAS) -> None:
    """Register formulas for one library of operators, once the flop counter is imported.

    Importing it imports Triton, which few processes need.

    Args:
        namespace: Name of the library under ``torch.ops``.
        formulas: By the name of the operator.
    """

    def enter() -> None:
        from torch.utils.flop_counter import register_flop_formula

        for name, formula in formulas.items():
            register_flop_formula(getattr(getattr(torch.ops, namespace), name))(formula)

    when_imported("torch.utils.flop_counter", enter)


def conv_flops(
    x: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape = (1, 1)
) -> int:
    """Operations of a convolution.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(K, C / groups, kh, kw)``.
        stride: ``(height, width)``.
        padding: ``(height, width)``.
        dilation: ``(height, width)``.
    """
    return 2 * prod(weight) * x[0] * prod(_output_size(x, weight, stride, padding, dilation))


def _output_size(
    x: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> list[int]:
    reach = [dilation[i] * (weight[i + 2] - 1) + 1 for i in (0, 1)]
    return [(x[i + 2] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]


@_formula("conv_bn_add_relu")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, residual, stride, padding, dilation, *_,
    **__,
):  # fmt: skip
    return conv_flops(x, weight, stride, padding, dilation)


@_formula("conv_bn_relu_maxpool")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, *_, **__
):  # fmt: skip
    return conv_flops(x, weight, stride, padding, dilation)


@_formula("conv_statistics")
def _(x, weight, conv_bias, stride, padding, dilation, *_, **__):  # type: ignore[no-untyped-def]
    return conv_flops(x, weight, stride, padding, dilation)


@_formula("conv_bn_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, residual, weight_shape, stride, padding, dilation, *_, **__
):  # fmt: skip
    return conv_flops(x, weight_shape, stride, padding, dilation)


@_formula("conv_bn_relu_maxpool_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, weight_shape, stride, padding, dilation, *_, **__
):  # fmt: skip
    return conv_flops(x, weight_shape, stride, padding, dilation)


@_formula("conv_conv_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, x2, packed, shift, weight_shape, stride, padding, dilation, stride2, *_, **__
):  # fmt: skip
    both = conv_flops(x, weight_shape, stride, padding, dilation)
    return both + conv_flops(x2, (weight_shape[0], x2[1], 1, 1), stride2, (0, 0))


@_formula("residual_block")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, joined, joined_shift, bottleneck, stride, dilation, groups, *_, **__
):  # fmt: skip
    own = 3 if bottleneck else 2
    return _block_flops(x, scale, own, len(scale) > own, stride, dilation, groups)


@_formula("run_program")
def _(x, tensors, steps, *_, **__):  # type: ignore[no-untyped-def]
    return sum(step.flops for step in program_shapes(x, steps))


@_formula("conv_forward")
def _(  # type: ignore[no-untyped-def]
    x, x_scale, x_shift, weight, stride, padding, dilation, *_, **__
):
    return conv_flops(x, weight, stride, padding, dilation)


@_formula("conv_backward")
def _(  # type: ignore[no-untyped-def]
    g, z, a, b, c, x, x_scale, x_shift, x_mean, weight, add, stride, padding, dilation, groups,
    need_input, need_weight, *_, **__,
):  # fmt: skip
    return (need_input + need_weight) * conv_flops(x, weight, stride, padding, dilation)


def _block_flops(
    x: Shape,
    scale: Sequence[Shape],
    own: int,
    projected: bool,
    stride: int,
    dilation: int,
    groups: int,
) -> int:
    """Operations of a residual block; convolutions as in its schema."""
    flops, h = 0, x
    middle = (
        own - 2
    )  # the convolution with the stride: a bottleneck's second, a basic block's first
    for i in range(own):
        size = 1 if own == 3 and i != 1 else 3
        s, d, g = (stride, dilation, groups) if i == middle else (1, 1, 1)
        weight = (scale[i][0], h[1] // g, size, size)
        geometry = ((s, s), (d * (size // 2),) * 2, (d, d))
        flops += conv_flops(h, weight, *geometry)
        h = (h[0], weight[0], *_output_size(h, weight, *geometry))
    if projected:
        flops += conv_flops(x, (scale[own][0], x[1], 1, 1), (stride, stride), (0, 0))
    return flops
