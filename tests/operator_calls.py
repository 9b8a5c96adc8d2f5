"""Records the operators that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Notes the operators that run inside of the ``with`` block.

    A row of residual blocks counts as so many blocks.

    Args:
        wanted: Whether an operator of this name counts, for example ``aten::add.Tensor``.

    Attributes:
        names: Of those that ran, in order.
        rows: How many blocks each row had, in order.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.wanted = wanted
        self.names: list[str] = []
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, times = func.name(), 1
        if name == "fused_resnet::residual_segment":
            name, times = "fused_resnet::residual_block", len(args[4])
            self.rows.append(times)
        if self.wanted(name):
            self.names += [name] * times
        return func(*args, **(kwargs or {}))

    def counts(self, library: str = "") -> Counter[str]:
        """How often each operator ran, of the libraries whose names begin so."""
        own = (name for name in self.names if name.startswith(library))
        return Counter(name.partition("::")[2] for name in own)
