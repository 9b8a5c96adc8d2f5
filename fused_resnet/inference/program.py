"""A frozen program: steps that one operator runs, and their modules.

``lowering`` makes programs from the traces of a frozen model's modules. On the CPU a program is one
call into the extension (:class:`fused_resnet._C.Program`), and an export stores it as one operator.
On CUDA, under a compiler and under autocast ``run_steps`` calls one operation after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import _C
from ..ops.program_steps import Step, encode
from . import export
from .run_steps import Steps


class Program(NamedTuple):
    """Steps that depend on one map alone; without tensors, so that copies and pickles can have it.

    Attributes:
        steps: Steps in the order in which they run; value 0 is the map.
        modules: The path of each step's convolution or fully connected layer; empty for none.
        outputs: The values that are read outside, in order.
        channels: Channels of the map; 0 for any.
    """

    steps: tuple[Step, ...]
    modules: tuple[str, ...]
    outputs: tuple[int, ...]
    channels: int = 0


class BoundProgram(Steps):
    """A program with the modules of one model.

    Args:
        program: The steps.
        owner: The module to which the paths are relative.

    Attributes:
        paths: The path of each step's module; empty for none.
        modules: Each step's module; None for none.
        numbers: The steps as the integers that the operator takes.
    """

    def __init__(self, program: Program, owner: nn.Module) -> None:
        super().__init__(program.steps, program.outputs)
        self.paths, self.numbers = program.modules, encode(program.steps)
        self.modules: list[Any] = [
            owner.get_submodule(path) if step.tensor >= 0 else None
            for step, path in zip(program.steps, program.modules, strict=True)
        ]

    def operands(self, index: int, plain: bool = False) -> list[Tensor]:
        """The tensors of a step: packed weight, scale and shift; weight and bias; or none.

        Args:
            index: Index of the step.
            plain: Take a convolution's weight in PyTorch's layout.
        """
        module = self.modules[index]
        if module is None:
            return []
        if not isinstance(module, nn.Linear):
            weight = module.plain_weight() if plain else module.packed
            return [weight, module.scale, module.shift]
        bias = module.bias
        if bias is None:
            bias = module.weight.new_zeros(module.out_features)
        return [module.weight, bias]

    def tensors(self, plain: bool = False) -> list[Tensor]:
        """The tensors of all steps, in the order of their indices.

        Args:
            plain: Take convolutions' weights in PyTorch's layout.
        """
        return [t for i in range(len(self.steps)) for t in self.operands(i, plain)]

    def native(self) -> Any:
        """A new call object of the extension: ``(x) -> list[Tensor]``."""
        return _C.Program(self.tensors(), self.numbers, list(self.outputs))

    def exported(self, x: Tensor) -> list[Tensor]:
        """The outputs while ``torch.export`` traces, which stores the program.

        Args:
            x: The program's input.
        """
        return export.run_program(x, self.tensors(plain=True), self.numbers, self.outputs)
