"""A guard: whether the modules behind a cached decision are unchanged since it was made.

A decision about modules (may one operation replace them?) depends on their children, tensors and
hooks, all of which a user may change later. Making it takes longer than a small convolution;
comparing against what was recorded at that time runs in the extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .._C import unchanged


class Guard:
    """Records the children, tensors and hooks of modules without hooks or replaced forwards.

    Args:
        modules: The modules to record. Of their children only the identity is recorded. Children
            and tensors of a ``ScriptModule`` are compiled into it and not recorded.
        owner: One more module to record, except for its hooks, which its caller runs.
    """

    def __init__(self, modules: Iterable[nn.Module], owner: nn.Module) -> None:
        modules = list(modules)
        members: list[dict[str, Any]] = []
        for m in (owner, *modules):
            if not isinstance(m, torch.jit.ScriptModule):
                members += (m._modules, m._parameters, m._buffers)
                if "_packed" in m.__dict__:  # a frozen convolution's weight
                    members.append(m._packed)  # type: ignore[arg-type]
        self._members = [values for values in members if values]
        self._recorded = tuple(chain.from_iterable(map(dict.values, self._members)))
        self._empty: list[dict[Any, Any]] = [values for values in members if not values]
        for m in modules:
            self._empty += (
                m._forward_hooks,
                m._forward_pre_hooks,
                m._backward_hooks,
                m._backward_pre_hooks,
            )
        self._attributes = [m.__dict__ for m in modules]

    def tensors(self) -> list[Tensor]:
        """The recorded tensors."""
        return [value for value in self._recorded if isinstance(value, Tensor)]

    def check(self) -> bool:
        """Whether the same objects are in the same places, and there is still no hook."""
        return unchanged(self._members, self._recorded, self._empty, self._attributes, "forward")
