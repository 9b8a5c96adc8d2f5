"""Which backend runs a call: the one that was asked for, or under ``auto`` the fastest.

While a compiler traces, ``auto`` is the device's own kernels and nothing is timed.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends.availability import current_backend
from ..tuning import tuner
from .registry import candidates


def fastest_backend(op: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """The fastest of the backends that can run an operator on the device of its arguments.

    Args:
        op: Name of the operator.
        backend: Backend of the device's own kernels, ``"cpu"`` or ``"cuda"``, or the one that was
            forced.
        arguments: All arguments of the operator; the first is the feature map.
    """
    if torch.compiler.is_compiling() or current_backend() != "auto":
        return backend
    among = candidates(op, backend)
    return tuner.choose(op, backend, among, arguments) if len(among) > 1 else backend


def has_single_backend(op: str, backend: str) -> bool:
    """Whether no other backend can take the place of ``backend`` for an operator.

    Args:
        op: Name of the operator.
        backend: ``"cpu"``, ``"cuda"`` or the one that was forced.
    """
    return current_backend() != "auto" or len(candidates(op, backend)) == 1
