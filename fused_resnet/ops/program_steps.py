"""The steps of a frozen program: what ``csrc/program.h`` reads, by name.

A program is a list of steps. Value 0 is its input; step i (from 0) makes value i + 1 from values
before it. The operator ``run_program`` takes the steps as one list of integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..backends.activation import Activation
from .checks import Pair

#: Names of the operations, in the order of ``csrc/program.h``: a convolution; the stem, with its
#: activation and max-pool; a max-pool; a shortcut that subsamples and adds channels of zeros;
#: the average of each channel; a fully connected layer; an average pool; the sum of two values.
OPERATIONS = (
    "conv",
    "conv_max_pool",
    "max_pool",
    "zero_pad_shortcut",
    "global_avg_pool",
    "linear",
    "avg_pool",
    "add_relu",
)

#: Number of integers of one step.
LENGTH = 24


class Step(NamedTuple):
    """One step.

    Attributes:
        operation: One of :data:`OPERATIONS`.
        input: Index of the value that it reads.
        residual: Index of the value that is added before the activation; -1 for none.
        tensor: Index of its first tensor: packed weight, scale and shift of a convolution, weight
            and bias of a fully connected layer; -1 for none.
        activation: Activation that is applied to the result of the step.
        kernel: Window of the convolution or of a pool, ``(height, width)``.
        stride: Stride of the convolution, of a pool or of a shortcut, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``; of a max-pool minus infinity.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        out_channels: Channels of a convolution's or a fully connected layer's result.
        winograd: Whether Winograd's algorithm may run.
        pool_kernel: Window of the stem's max-pool, ``(height, width)``.
        pool_stride: Stride of the stem's max-pool, ``(height, width)``.
        pool_padding: Padding of the stem's max-pool, ``(height, width)``.
        zeros: Channels of zeros that a shortcut adds on each side.
        ceil_mode: Whether the last window of a max-pool or an average pool may reach beyond the
            padding; it begins inside of the map or of the padding before it.
    """

    operation: str
    input: int
    residual: int = -1
    tensor: int = -1
    activation: Activation = Activation.NONE
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    out_channels: int = 0
    winograd: bool = False
    pool_kernel: Pair = (1, 1)
    pool_stride: Pair = (1, 1)
    pool_padding: Pair = (0, 0)
    zeros: int = 0
    ceil_mode: bool = False


def encode(steps: Iterable[Step]) -> list[int]:
    """The argument ``steps`` of the operator.

    Args:
        steps: Steps of the program, in the order in which they run.
    """
    numbers: list[int] = []
    for step in steps:
        numbers.append(OPERATIONS.index(step.operation))
        for value in step[1:]:
            numbers += value if isinstance(value, tuple) else [int(value)]
    return numbers


def decode(numbers: Sequence[int]) -> list[Step]:
    """The steps of the operator's argument.

    Args:
        numbers: The steps as integers, :data:`LENGTH` for each step.
    """
    return [_step(numbers[at : at + LENGTH]) for at in range(0, len(numbers), LENGTH)]


def _step(numbers: Sequence[int]) -> Step:
    values: list[Any] = [OPERATIONS[numbers[0]]]
    at = 1
    for default in (0, 0, *Step._field_defaults.values())[1:]:
        if isinstance(default, tuple):
            values.append((numbers[at], numbers[at + 1]))
            at += 2
        else:
            values.append(type(default)(numbers[at]))
            at += 1
    return Step(*values)
