"""Shapes of the values of a program, and its floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from .program_steps import Step, decode

Shape = Sequence[Any]


class StepShapes(NamedTuple):
    """What a step computes, without its data.

    Attributes:
        result: Shape of the step's result, ``(N, C, H, W)`` or ``(N, C)``.
        flops: Floating-point operations of its convolution or matrix product, else 0; a
            multiply-add counts as two.
    """

    result: list[Any]
    flops: Any


def program_shapes(x: Shape, steps: Sequence[int]) -> list[StepShapes]:
    """The shapes of all steps' results; value ``i + 1`` of the program is element ``i``.

    Args:
        x: Shape of the program's input, ``(N, C, H, W)``; sizes may be symbols.
        steps: The program's integers.

    Returns:
        One element for each step.
    """
    values: list[Shape] = [x]
    result = []
    for step in decode(steps):
        shapes = _shapes(values[step.input], step)
        values.append(shapes.result)
        result.append(shapes)
    return result


def _shapes(x: Shape, step: Step) -> StepShapes:
    if step.operation in ("conv", "conv_max_pool"):
        pixels = windows(x, step.kernel, step.stride, step.padding, step.dilation)
        shape = [x[0], step.out_channels, *pixels]
        flops = 2 * prod(shape) * prod(step.kernel) * (x[1] // step.groups)
        if step.operation == "conv_max_pool":
            pixels = windows(shape, step.pool_kernel, step.pool_stride, step.pool_padding)
            shape = [*shape[:2], *pixels]
        return StepShapes(shape, flops)
    if step.operation == "linear":
        return StepShapes([x[0], step.out_channels], 2 * x[0] * x[1] * step.out_channels)
    if step.operation == "global_avg_pool":
        return StepShapes([x[0], x[1], 1, 1], 0)
    if step.operation == "zero_pad_shortcut":
        pixels = windows(x, (1, 1), step.stride, (0, 0))
        return StepShapes([x[0], x[1] + 2 * step.zeros, *pixels], 0)
    if step.operation in ("max_pool", "avg_pool"):
        pixels = windows(x, step.kernel, step.stride, step.padding, ceil_mode=step.ceil_mode)
        return StepShapes([*x[:2], *pixels], 0)
    return StepShapes(list(x), 0)  # add_relu


def windows(
    x: Shape,
    kernel: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape = (1, 1),
    ceil_mode: bool = False,
) -> list[Any]:
    """How often a window fits on a map, ``[rows, columns]``.

    Args:
        x: Shape of the map, ``(N, C, H, W)``.
        kernel: Size of the window, ``(height, width)``.
        stride: Step of the window, ``(height, width)``.
        padding: Padding on each side, ``(height, width)``.
        dilation: Distance between the window's elements, ``(height, width)``.
        ceil_mode: Whether the last window may reach beyond the padding; it begins before the
            map's end.
    """
    found = []
    for i in (0, 1):
        room = x[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        last = room // stride[i]
        if ceil_mode:
            most = (x[i + 2] + padding[i] - 1) // stride[i]
            last = torch.sym_min((room + stride[i] - 1) // stride[i], most)
        found.append(last + 1)
    return found
