"""Shapes of the values of a program, and its operations; ``csrc/program.h`` describes a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

Shape = Sequence[Any]

#: Integers of a step.
STEP_INTS = 24


class StepShapes(NamedTuple):
    """What a step computes, without its data.

    Attributes:
        result: Shape of the step's result, ``(N, C, H, W)`` or ``(N, C)``.
        flops: Floating-point operations of its convolution or matrix product, else 0; a
            multiply-add counts as two.
    """

    result: list[Any]
    flops: Any


def program_shapes(x: Shape, tensors: Sequence[Shape], steps: Sequence[int]) -> list[StepShapes]:
    """The shapes of all steps' results; value ``i + 1`` of the program is element ``i``.

    Args:
        x: Shape of the program's input, ``(N, C, H, W)``; sizes may be symbols.
        tensors: Shapes of the program's tensors.
        steps: The program's integers.

    Returns:
        One element for each step.
    """
    values: list[Shape] = [x]
    result = []
    for step in _split(steps):
        operation, value, _, tensor = step[:4]
        shape, flops = _STEPS[operation](values[value], tensors[tensor:], step)
        values.append(shape)
        result.append(StepShapes(shape, flops))
    return result


def _split(steps: Sequence[int]) -> Iterator[Sequence[int]]:
    return (steps[i : i + STEP_INTS] for i in range(0, len(steps), STEP_INTS))


def _windows(x: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> list[Any]:
    return [
        (x[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]


def _pool(x: Shape, step: Sequence[int], at: int = 5) -> list[Any]:
    """``at``: the place of the kernel's height; width, stride and padding follow."""
    size = _windows(x, step[at : at + 2], step[at + 2 : at + 4], step[at + 4 : at + 6], (1, 1))
    return [x[0], x[1], *size]


def _conv(x: Shape, _: Sequence[Shape], step: Sequence[int]) -> tuple[list[Any], Any]:
    kernel, stride, padding, dilation = (step[at : at + 2] for at in (5, 7, 9, 11))
    groups, channels = step[13:15]
    shape = [x[0], channels, *_windows(x, kernel, stride, padding, dilation)]
    return shape, 2 * prod(shape) * prod(kernel) * (x[1] // groups)


def _conv_max_pool(x: Shape, t: Sequence[Shape], step: Sequence[int]) -> tuple[list[Any], Any]:
    shape, flops = _conv(x, t, step)
    return _pool(shape, step, 16), flops


def _zero_pad(x: Shape, _: Sequence[Shape], step: Sequence[int]) -> tuple[list[Any], Any]:
    size = [(x[i + 2] + step[7 + i] - 1) // step[7 + i] for i in (0, 1)]
    return [x[0], x[1] + 2 * step[22], *size], 0


def _linear(x: Shape, tensors: Sequence[Shape], _: Sequence[int]) -> tuple[list[Any], Any]:
    classes = tensors[0][0]
    return [x[0], classes], 2 * x[0] * x[1] * classes


#: By the number of the operation.
_STEPS = (
    _conv,
    _conv_max_pool,
    lambda x, _, step: (_pool(x, step), 0),
    _zero_pad,
    lambda x, _, step: ([x[0], x[1], 1, 1], 0),
    _linear,
    lambda x, _, step: (_pool(x, step), 0),
    lambda x, _, step: (list(x), 0),
)
