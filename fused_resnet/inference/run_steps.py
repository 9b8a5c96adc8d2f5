"""Runs a program by one operation for each of its steps, or for each residual block.

For the devices and modes in which a program is not one call of the extension.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.activation import activate_
from ..ops import packed as packed_ops
from ..ops.program_steps import Step
from .step_blocks import BlockSteps, block_operands, blocks_of

#: Steps that have tensors, and how many.
TENSORS = {"conv": 3, "conv_max_pool": 3, "linear": 2}


class Steps:
    """Steps and their tensors.

    Args:
        steps: Steps in the order in which they run.
        outputs: The values that are returned, in order.

    Attributes:
        blocks: The residual blocks among the steps, by the index of each of their steps.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        self.steps, self.outputs = tuple(steps), tuple(outputs)
        self.blocks = blocks_of(self.steps)

    def operands(self, index: int) -> Sequence[Tensor]:
        """The tensors of a step: packed weight, scale and shift; weight and bias; or none.

        Args:
            index: Index of the step.
        """
        raise NotImplementedError


#: Runs one step: called with its program, its index, the program's input, and what runs it.
RunStep = Callable[[Any, int, Tensor, Callable[[], Tensor]], Tensor]

_SEPARATE: contextvars.ContextVar[RunStep | None] = contextvars.ContextVar("separate", default=None)


@contextlib.contextmanager
def separate_operations(
    run: RunStep = lambda program, index, x, operation: operation(),
) -> Iterator[None]:
    """Run each step of every frozen model as its own operation; in this thread.

    ``torch.compile`` does not see it: that of torch 2.11 cannot trace a ContextVar.

    Args:
        run: Runs each step; its default only runs it.
    """
    token = _SEPARATE.set(run)
    try:
        yield
    finally:
        _SEPARATE.reset(token)


def are_separate() -> bool:
    """Whether :func:`separate_operations` is active in this thread."""
    return not torch.compiler.is_compiling() and _SEPARATE.get() is not None


def run_steps(
    program: Steps, x: Tensor, backend: str, known: dict[Any, Any] | None = None
) -> list[Tensor]:
    """The outputs of a program.

    Args:
        program: The program.
        x: Input of the program.
        backend: The result of :func:`.resolve_backend` for ``residual_block``.
        known: Keeps the operands of blocks; None to keep nothing.
    """
    values: dict[int, Tensor] = {0: x}
    run = None if torch.compiler.is_compiling() else _SEPARATE.get()
    for i, step in enumerate(program.steps):
        block = None if backend == "reference" else program.blocks.get(i)
        if run is not None:
            operation = functools.partial(run_step, step, program.operands(i), values)
            values[i + 1] = run(program, i, x, operation)
        elif block is None:
            values[i + 1] = run_step(step, program.operands(i), values)
        elif i == block.last:
            values[i + 1] = _run_block(program, block, values[block.input], backend, known)
    return [values[i] for i in program.outputs]


def _run_block(
    program: Steps, block: BlockSteps, x: Tensor, backend: str, known: dict[Any, Any] | None
) -> Tensor:
    if known is None or torch.compiler.is_compiling():
        convs = [program.operands(i) for i in block.convs]
        operands = block_operands(block, program.steps, convs, False)
        return packed_ops.run_residual_block(backend, x, operands)
    key = (program, block.last, backend == "cpu")
    if key not in known:
        convs = [program.operands(i) for i in block.convs]
        known[key] = block_operands(block, program.steps, convs, backend != "cpu")
    return packed_ops.run_residual_block(backend, x, known[key])


def run_step(step: Step, operands: Sequence[Tensor], values: dict[int, Tensor]) -> Tensor:
    """The value of one step, by a single operation.

    Args:
        step: The step.
        operands: Tensors of the step.
        values: The program's input and the values so far.
    """
    x = values[step.input]
    residual = None if step.residual < 0 else values[step.residual]
    window = (step.kernel, step.stride, step.padding)
    if step.operation in ("conv", "conv_max_pool"):
        settings: dict[str, Any] = {
            "weight_shape": (step.out_channels, x.shape[1] // step.groups, *step.kernel),
            "stride": step.stride,
            "padding": step.padding,
            "dilation": step.dilation,
            "groups": step.groups,
            "activation": step.activation,
        }
        if step.operation == "conv":
            settings["winograd"] = step.winograd
            weight, scale, shift = operands
            return packed_ops.conv_bn_add_relu_packed(x, weight, scale, shift, residual, **settings)
        pool = ("pool_kernel", "pool_stride", "pool_padding")
        settings |= {name: getattr(step, name) for name in pool}
        return packed_ops.conv_bn_relu_maxpool_packed(x, *operands, **settings)
    if step.operation == "linear":
        return packed_ops.linear(x, *operands)
    if step.operation == "max_pool":
        return F.max_pool2d(x, *window, ceil_mode=step.ceil_mode)
    if step.operation == "avg_pool":
        return F.avg_pool2d(x, *window, step.ceil_mode)
    if step.operation == "global_avg_pool":
        return packed_ops.global_avg_pool(x)
    if step.operation == "zero_pad_shortcut":
        subsampled = x[:, :, :: step.stride[0], :: step.stride[1]]
        return F.pad(subsampled, (0, 0, 0, 0, step.zeros, step.zeros))
    assert residual is not None  # add_relu
    return activate_(x + residual, step.activation)
