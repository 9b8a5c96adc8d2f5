"""What a frozen model runs on the CPU for one batch: its programs, step by step, as planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _C
from ..ops.program_shapes import program_shapes
from ..ops.program_steps import Step
from .program import BoundProgram
from .run_steps import separate_operations


class ExplainedStep(NamedTuple):
    """One step of a program, for one batch.

    Attributes:
        path: Path of its convolution or fully connected layer in the model; empty for none.
        step: The step.
        x: Shape of its input.
        result: Shape of its result.
        algorithm: Algorithm of its convolution; empty for none.
        images: Number of images in a micro-batch.
        flops: Flops of its convolution or matrix product, a multiply-add counted as two.
        weight_bytes: Bytes of its weight.
    """

    path: str
    step: Step
    x: tuple[int, ...]
    result: tuple[int, ...]
    algorithm: str
    images: int
    flops: int
    weight_bytes: int


class ExplainedProgram(NamedTuple):
    """A program, for one batch.

    Attributes:
        path: Path of the module that runs it; empty for the model itself.
        steps: Steps of the program, in the order in which they run.
    """

    path: str
    steps: list[ExplainedStep]

    @property
    def images(self) -> tuple[int, int]:
        """The least and the most images of a micro-batch."""
        sizes = [step.images for step in self.steps]
        return min(sizes), max(sizes)


def explain(model: nn.Module, images: Tensor) -> list[ExplainedProgram]:
    """The programs that a call runs, in the order of the call.

    Args:
        model: A frozen model, or one with frozen parts, on the CPU. It is called once.
        images: Input of the model.
    """
    explainer = Explainer(model)
    found: dict[tuple[BoundProgram, tuple[int, ...]], ExplainedProgram] = {}

    def note(program: BoundProgram, index: int, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        if not index:
            found.setdefault((program, tuple(x.shape)), explainer(program, x))
        return run()

    with torch.inference_mode(), separate_operations(note):
        model(images)
    return list(found.values())


class Explainer:
    """Explains the programs of one model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = {
            program: path
            for path, module in model.named_modules()
            for program in getattr(module, "_frozen_programs", ())
        }

    def __call__(self, program: BoundProgram, x: Tensor) -> ExplainedProgram:
        """Explain one program.

        Args:
            program: A program of the model.
            x: Input of the program.
        """
        owner, numbers = self._owners[program], program.numbers
        shapes: list[Any] = [x.shape]
        shapes += [s.result for s in program_shapes(x.shape, numbers)]
        flops = [s.flops for s in program_shapes(x.shape, numbers)]
        planned = _C.program_report(
            program.tensors(), numbers, list(program.outputs), list(x.shape), x.dtype
        )
        steps = []
        for i, (step, plan) in enumerate(zip(program.steps, planned, strict=True)):
            path = ".".join(part for part in (owner, program.paths[i]) if part)
            weight = next(iter(program.operands(i)), None)
            _, algorithm, count = plan
            steps.append(
                ExplainedStep(
                    path if weight is not None else "",
                    step,
                    tuple(shapes[step.input]),
                    tuple(shapes[i + 1]),
                    algorithm,
                    count,
                    flops[i],
                    0 if weight is None else weight.nbytes,
                )
            )
        return ExplainedProgram(owner, steps)


def summary(programs: Sequence[ExplainedProgram]) -> str:
    """What runs, in one line.

    Args:
        programs: A result of :func:`explain`.
    """
    steps = sum(len(program.steps) for program in programs)
    line = f"{len(programs)} program{'s' * (len(programs) != 1)} of {steps} steps"
    if not programs:
        return line
    least = min(program.images[0] for program in programs)
    most = max(program.images[1] for program in programs)
    line += f", micro-batches of {least}" + (f" to {most}" if most > least else "")
    return f"{line} image{'s' * (most != 1)}, {_C.build_info()['isa']}"


def describe(step: ExplainedStep) -> str:
    """A step in a few words: window, stride, channels, map, and what it takes over.

    Args:
        step: The step.
    """
    s = step.step
    if s.operation in ("conv", "conv_max_pool"):
        what = geometry(step.x, step.result[1], s.kernel, s.stride, s.groups)
        what += ", residual" if s.residual >= 0 else ""
        return what + (", max-pool" if s.operation == "conv_max_pool" else "")
    if s.operation in ("max_pool", "avg_pool"):
        stride = f"/{s.stride[0]}" if s.stride[0] > 1 else ""
        return f"{s.operation} {s.kernel[0]}x{s.kernel[1]}{stride}" + ", ceil_mode" * s.ceil_mode
    return s.operation


def geometry(
    x: Sequence[int], channels: int, kernel: Sequence[int], stride: Sequence[int], groups: int
) -> str:
    """A convolution in a few words.

    Args:
        x: Shape of its input.
        channels: Channels of its result.
        kernel: Size of the filters, ``(height, width)``.
        stride: Stride of the convolution, ``(height, width)``.
        groups: Number of independent groups of channels.
    """
    slash = f"/{stride[0]}" if stride[0] > 1 else ""
    what = f"{kernel[0]}x{kernel[1]}{slash} {x[1]} to {channels}, {x[2]}x{x[3]}"
    return what + (f", {groups} groups" if groups > 1 else "")
