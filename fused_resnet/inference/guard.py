"""Whether modules are still what they were, asked at every call and so made cheap.

A decision about modules (may one operation stand for them?) depends on their children, tensors and
hooks, all of which a user may change later. Deciding takes longer than a small convolution; a
comparison with what was there when it was decided runs in the extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .._C import unchanged


class Guard:
    """The children, tensors and hooks of modules that have no hook and no replaced forward.

    Args:
        modules: The modules; their children count only as which they are. What a ``ScriptModule``
            holds is compiled, and not looked at.
        owner: One more whose hooks do not count: whoever calls it runs them.
    """

    def __init__(self, modules: Iterable[nn.Module], owner: nn.Module) -> None:
        modules = list(modules)
        members: list[dict[str, Any]] = []
        for m in (owner, *modules):
            if not isinstance(m, torch.jit.ScriptModule):
                members += (m._modules, m._parameters, m._buffers)
                if "_packed" in m.__dict__:  # a frozen convolution's weight
                    members.append(m._packed)  # type: ignore[arg-type]
        self._members = [held for held in members if held]
        self._held = tuple(chain.from_iterable(map(dict.values, self._members)))
        self._empty: list[dict[Any, Any]] = [held for held in members if not held]
        for m in modules:
            self._empty += (
                m._forward_hooks,
                m._forward_pre_hooks,
                m._backward_hooks,
                m._backward_pre_hooks,
            )
        self._attributes = [m.__dict__ for m in modules]

    def tensors(self) -> list[Tensor]:
        """Those that were there."""
        return [held for held in self._held if isinstance(held, Tensor)]

    def holds(self) -> bool:
        """Whether all is as it was: the same objects in the same places, and still no hook."""
        return unchanged(self._members, self._held, self._empty, self._attributes, "forward")
