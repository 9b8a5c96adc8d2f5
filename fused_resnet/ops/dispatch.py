"""Which backend runs a call: the one that was asked for, or under ``auto`` the fastest.

A compiler traces this: it takes the device's own kernels, and nothing is timed.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends.availability import current_backend
from ..tuning import tuner
from .registry import candidates


def chosen(op: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """The backend that runs an operator, of those whose operators may take ``backend``'s place.

    Args:
        op: The operator.
        backend: What :func:`fused_resnet.backends.select` says, and not ``"reference"``.
        arguments: Of the operator; the first is the map.
    """
    if torch.compiler.is_compiling() or current_backend() != "auto":
        return backend
    among = candidates(op, backend)
    return tuner.choose(op, backend, among, arguments) if len(among) > 1 else backend


def settled(op: str, backend: str) -> bool:
    """Whether ``backend`` runs every call of an operator that it may run: none has a choice.

    Args:
        op: See :func:`chosen`.
        backend: See :func:`chosen`.
    """
    return current_backend() != "auto" or len(candidates(op, backend)) == 1
