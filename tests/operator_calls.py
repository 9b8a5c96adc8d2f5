"""Records the operators that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.ops.program_steps import Step, decode

_OPERATORS = {
    "conv": "conv_bn_add_relu_packed",
    "conv_max_pool": "conv_bn_relu_maxpool_packed",
    "block": "residual_block",
}


class OperatorCalls(TorchDispatchMode):
    """Notes the operators that run inside of the ``with`` block.

    A program counts as the operators that its steps and residual blocks stand for.

    Args:
        wanted: Whether an operator of this name counts, for example ``aten::add.Tensor``.

    Attributes:
        names: Of those that ran, in order.
        rows: How many residual blocks each program had, in order.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.wanted = wanted
        self.names: list[str] = []
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [func.name()]
        if names == ["fused_resnet::run_program"]:
            kinds = parts_of(decode(args[2]))
            names = [f"fused_resnet::{_OPERATORS.get(kind, kind)}" for kind in kinds]
            self.rows.append(kinds.count("block"))
        self.names += filter(self.wanted, names)
        return func(*args, **(kwargs or {}))

    def counts(self, library: str = "") -> Counter[str]:
        """How often each operator ran, of the libraries whose names begin so."""
        own = (name for name in self.names if name.startswith(library))
        return Counter(name.partition("::")[2] for name in own)


def parts_of(steps: Sequence[Step]) -> list[str]:
    """The operations of a program, in which ``block`` stands for a whole residual block.

    A block ends in a convolution with residual and activation: the one or two convolutions before
    it, and what makes its residual for it alone, belong to it.
    """
    uses = Counter(v for step in steps for v in (step.input, step.residual))
    inside: set[int] = set()
    ends: set[int] = set()
    for i, step in enumerate(steps):
        if step.operation != "conv" or step.residual < 0 or not step.activation:
            continue
        at, before = step.input, list[int]()
        while at and uses[at] == 1 and steps[at - 1].operation == "conv" and len(before) < 2:
            before.append(at - 1)
            at = steps[at - 1].input
        if before:
            ends.add(i)
            inside.update(before)
            if step.residual and uses[step.residual] == 1:
                inside.add(step.residual - 1)
    return [
        "block" if i in ends else step.operation for i, step in enumerate(steps) if i not in inside
    ]
