"""A frozen program: steps that one operator runs, and their modules.

``lowering`` makes programs from the traces of a frozen model's modules. On the CPU a program is one
call into the extension (:class:`fused_resnet._C.Program`). On CUDA, under a compiler, for an export
and under autocast :func:`run_steps` calls one operation after the other, a residual block as one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C
from ..ops import packed as packed_ops
from ..ops.program_steps import Step, encode
from . import export
from .step_blocks import BlockSteps, block_operands, blocks_of

#: Steps whose module has tensors, and how many.
TENSORS = {"conv": 3, "conv_max_pool": 3, "linear": 2}


class Program(NamedTuple):
    """Steps that depend on one map alone; without tensors, so that copies and pickles can have it.

    Attributes:
        steps: In order; value 0 is the map.
        modules: The path of each step's convolution or fully connected layer; empty for none.
        outputs: The values that are read outside, in order.
        channels: Of the map; 0 for any.
    """

    steps: tuple[Step, ...]
    modules: tuple[str, ...]
    outputs: tuple[int, ...]
    channels: int = 0


class BoundProgram:
    """A program with the modules of one model.

    Args:
        program: The steps.
        owner: The module to which the paths are relative.
    """

    def __init__(self, program: Program, owner: nn.Module) -> None:
        self.steps, self.paths, self.outputs = program.steps, program.modules, program.outputs
        self.modules: list[Any] = [
            owner.get_submodule(path) if step.tensor >= 0 else None
            for step, path in zip(program.steps, program.modules, strict=True)
        ]
        self.blocks = blocks_of(self.steps)

    def tensors(self) -> list[Tensor]:
        """The tensors of all steps, in the order of their indices."""
        return [t for module in self.modules if module is not None for t in _tensors(module)]

    def weight(self, index: int) -> Tensor | None:
        """The weight of a step; None for none.

        Args:
            index: Of the step.
        """
        module = self.modules[index]
        return None if module is None else _tensors(module)[0]

    def native(self) -> Any:
        """A new call object of the extension: ``(x) -> list[Tensor]``."""
        return _C.Program(self.tensors(), encode(self.steps), list(self.outputs))


def _tensors(module: Any) -> list[Tensor]:
    if isinstance(module, nn.Linear):
        bias = module.bias
        if bias is None:
            bias = module.weight.new_zeros(module.out_features)
        return [module.weight, bias]
    return [module.packed, module.scale, module.shift]


#: Runs one step: called with its program, its index, the program's input, and what runs it.
RunStep = Callable[[BoundProgram, int, Tensor, Callable[[], Tensor]], Tensor]

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
    bound: BoundProgram, x: Tensor, backend: str, known: dict[Any, Any] | None = None
) -> list[Tensor]:
    """The outputs of a program, by one operation for each step or residual block.

    Args:
        bound: The program.
        x: Its input.
        backend: The result of :func:`.resolve_backend` for ``residual_block``.
        known: Keeps the operands of blocks; None to keep nothing.
    """
    values: dict[int, Tensor] = {0: x}
    run = None if torch.compiler.is_compiling() else _SEPARATE.get()
    for i, step in enumerate(bound.steps):
        block = bound.blocks.get(i)
        if run is not None:
            operation = functools.partial(run_step, step, bound.modules[i], values)
            values[i + 1] = run(bound, i, x, operation)
        elif block is None:
            values[i + 1] = run_step(step, bound.modules[i], values)
        elif i == block.last:
            values[i + 1] = _run_block(bound, block, values[block.input], backend, known)
    return [values[i] for i in bound.outputs]


def _run_block(
    bound: BoundProgram, block: BlockSteps, x: Tensor, backend: str, known: dict[Any, Any] | None
) -> Tensor:
    convs = [bound.modules[i] for i in block.convs]
    if known is None or export.is_exporting() or torch.compiler.is_compiling():
        operands = block_operands(block, bound.steps, convs, False)
        functions: Any = export if export.is_exporting() else packed_ops
        return functions.run_residual_block(backend, x, operands)
    key = (bound, block.last, backend == "cpu")
    if key not in known:
        known[key] = block_operands(block, bound.steps, convs, backend != "cpu")
    return packed_ops.run_residual_block(backend, x, known[key])


def run_step(step: Step, module: Any, values: Sequence[Tensor] | dict[int, Tensor]) -> Tensor:
    """The value of one step, by a single operation.

    Args:
        step: The step.
        module: Its convolution or fully connected layer; None for none.
        values: The program's input and the values so far.
    """
    x = values[step.input]
    residual = None if step.residual < 0 else values[step.residual]
    if step.operation == "conv":
        return module.forward(x, residual, step.relu)
    if step.operation == "conv_max_pool":
        return module.forward(x, None, True, True)
    if step.operation == "linear":
        functions: Any = export if export.is_exporting() else packed_ops
        return functions.linear(x, module.weight, module.bias)
    if step.operation == "max_pool":
        window = (step.kernel, step.stride, step.padding)
        return F.max_pool2d(x, *window, ceil_mode=step.ceil_mode)
    if step.operation == "avg_pool":
        return F.avg_pool2d(x, step.kernel, step.stride, step.padding, step.ceil_mode)
    if step.operation == "global_avg_pool":
        return (export if export.is_exporting() else packed_ops).global_avg_pool(x)
    if step.operation == "zero_pad_shortcut":
        subsampled = x[:, :, :: step.stride[0], :: step.stride[1]]
        return F.pad(subsampled, (0, 0, 0, 0, step.zeros, step.zeros))
    assert residual is not None  # add_relu
    total = x + residual
    return total.relu_() if step.relu else total
