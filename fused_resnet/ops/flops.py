"""Flop formulas, so that ``torch.utils.flop_counter.FlopCounterMode`` counts the fused operators.

As in PyTorch's own formulas a multiply-add counts as two operations, a convolution counts by its
definition whatever algorithm computes it. Batch norm, ReLU, additions and pooling count nothing.
A formula gets the operator's arguments with each tensor replaced by its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from ..backends import composed_block
from .program_shapes import program_shapes, windows
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
        formulas: Formulas by the name of the operator.
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
        x: Shape of the input, ``(N, C, H, W)``.
        weight: Shape of the filters, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
    """
    return 2 * prod(weight) * x[0] * prod(windows(x, weight[2:], stride, padding, dilation))


def _enter_convolution(op: str) -> None:
    """Enter the formula of an operator that is a convolution, or its wanted gradients."""
    names = [a.name for a in getattr(torch.ops.fused_resnet, op).default._schema.arguments]

    def flops(*shapes: Any, **more: Any) -> int:
        a = dict(zip(names, shapes, strict=False)) | more
        weight = a.get("weight_shape") or a["weight"]
        times = a.get("need_input", True) + a.get("need_weight", False)
        return times * conv_flops(a["x"], weight, a["stride"], a["padding"], a["dilation"])

    FORMULAS[op] = flops


for _op in (
    "conv_bn_add_relu",
    "conv_bn_relu_maxpool",
    "conv_statistics",
    "conv_bn_add_relu_packed",
    "conv_bn_relu_maxpool_packed",
    "conv_forward",
    "conv_backward",
):
    _enter_convolution(_op)


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
    flops = 0

    def conv(h, packed, scale, shift, residual, weight, *geometry):  # type: ignore[no-untyped-def]
        nonlocal flops
        flops += conv_flops(h.shape, weight, *geometry[:3])
        return _Shaped((h.shape[0], weight[0], *windows(h.shape, weight[2:], *geometry[:3])))

    block = (bottleneck, stride, dilation, groups)
    stand_in: Any = _Shaped
    composed_block.residual_block(conv, stand_in(x), packed, [*map(stand_in, scale)], shift, *block)
    return flops


class _Shaped(NamedTuple):
    """Stands for a tensor."""

    shape: Any


@_formula("run_program")
def _(x, tensors, steps, *_, **__):  # type: ignore[no-untyped-def]
    return sum(step.flops for step in program_shapes(x, steps))
