"""The backend that runs a call: the one that was forced, or the fastest one under ``auto``.

While a compiler traces, ``auto`` means the device's own kernels, and nothing is timed.
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
        backend: The backend of the device's own kernels, ``"cpu"`` or ``"cuda"``, or the one that
            was forced.
        arguments: All arguments of the operator; the first is the feature map.
    """
    if torch.compiler.is_compiling() or current_backend() != "auto":
        return backend
    options = candidates(op, backend)
    return tuner.choose(op, backend, options, arguments) if len(options) > 1 else backend
