"""Residual blocks among a program's steps, for devices that run a whole block as one operation.

On CUDA there are two gains over one call for each convolution: where a bottleneck has 64 or 128
middle channels its last two convolutions are one kernel (``csrc/cuda/kernels/residual_block.cuh``);
and where a block has a projection shortcut, the shortcut's convolution and the block's last are one
GEMM over their concatenated input channels, so that the shortcut's result is never stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.activation import Activation
from ..ops.program_steps import Step


class BlockSteps(NamedTuple):
    """The steps of one basic block or bottleneck.

    Attributes:
        input: The value that the block reads.
        convs: Indices of its own convolutions in order, and then of its shortcut's, if it has one.
        own: Number of its own convolutions, 2 or 3.
        last: Index of the step that makes its result.
    """

    input: int
    convs: tuple[int, ...]
    own: int
    last: int


def blocks_of(steps: Sequence[Step]) -> dict[int, BlockSteps]:
    """The blocks of a program, by the index of each of their steps.

    Args:
        steps: Steps of the program.
    """
    uses = Counter(v for step in steps for v in (step.input, step.residual) if v >= 0)
    found: dict[int, BlockSteps] = {}
    for last, step in enumerate(steps):
        block = _block_that_ends(steps, last, uses) if step.operation == "conv" else None
        if block is not None:
            found |= dict.fromkeys(block.convs, block)
    return found


def _block_that_ends(steps: Sequence[Step], last: int, uses: Counter[int]) -> BlockSteps | None:
    end = steps[last]
    if end.residual < 0 or not end.activation:
        return None

    def before(value: int, activation: Activation) -> int:
        """The convolution that makes a value which nothing else reads; -1 for none."""
        step = steps[value - 1] if value > 0 else end
        plain = step.operation == "conv" and step.residual < 0
        plain = plain and step.activation == activation
        return value - 1 if plain and uses[value] == 1 else -1

    convs = [last]
    while len(convs) < 3 and (previous := before(steps[convs[0]].input, end.activation)) >= 0:
        convs.insert(0, previous)
    for own in (3, 2):
        if len(convs) < own:
            continue
        chain = tuple(convs[-own:])
        start = steps[chain[0]].input
        shortcut = before(end.residual, Activation.NONE)
        if end.residual == start:
            block = BlockSteps(start, chain, own, last)
        elif shortcut >= 0 and steps[shortcut].input == start:
            block = BlockSteps(start, (*chain, shortcut), own, last)
        else:
            continue
        if _is_supported([steps[i] for i in block.convs], own):
            return block
    return None


def _is_supported(convs: Sequence[Step], own: int) -> bool:
    """Whether ``residual_block`` computes convolutions of this geometry."""
    middle = convs[own - 2]
    stride, dilation, groups = middle.stride, middle.dilation, middle.groups
    if own == 3:
        expected = [(1, (1, 1), (1, 1), 1), (3, stride, dilation, groups), (1, (1, 1), (1, 1), 1)]
    else:
        expected = [(3, stride, (1, 1), 1), (3, (1, 1), (1, 1), 1)]
    if len(convs) > own:
        expected.append((1, stride, (1, 1), 1))
    elif stride != (1, 1):
        return False
    if stride[0] != stride[1] or dilation[0] != dilation[1]:
        return False
    for conv, (size, *settings) in zip(convs, expected, strict=True):
        border = tuple(d * (size // 2) for d in conv.dilation)
        if (conv.kernel, conv.padding) != ((size, size), border):
            return False
        if [conv.stride, conv.dilation, conv.groups] != settings:
            return False
    return True


def block_operands(
    block: BlockSteps, steps: Sequence[Step], convs: Sequence[Sequence[Tensor]], concatenates: bool
) -> tuple[Any, ...]:
    """The arguments of the operator ``residual_block`` after the input.

    Args:
        block: The block.
        steps: Steps of the program that the block is part of.
        convs: Packed weight, scale and shift of each convolution, in the order of ``block.convs``.
        concatenates: Whether the last convolution's and the shortcut's weight become one.
    """
    middle = steps[block.convs[block.own - 2]]
    both: tuple[Tensor | None, Tensor | None] = (None, None)
    if concatenates and len(convs) > block.own:
        both = concatenate(*convs[-2:])
    return (
        *map(list, zip(*convs, strict=True)),
        *both,
        block.own == 3,
        middle.stride[0],
        middle.dilation[0],
        middle.groups,
        all(steps[i].winograd for i in block.convs),
        steps[block.last].activation,
    )


@torch.no_grad()
def concatenate(last: Sequence[Tensor], shortcut: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights of two convolutions whose results are added, each times its scale, filter by filter.

    Products with the scale are float64, rounded once to the weights' dtype.

    Args:
        last: Packed weight, scale and shift of the block's last convolution.
        shortcut: Packed weight, scale and shift of the shortcut's convolution.

    Returns:
        The concatenated weight, flat, and the sum of the shifts, ``(K,)``.
    """
    scaled = [
        packed.double().view(scale.numel(), -1) * scale.double().view(-1, 1)
        for packed, scale, _ in (last, shortcut)
    ]
    weight = torch.cat(scaled, 1).to(last[0].dtype).flatten()
    return weight, last[2] + shortcut[2]
