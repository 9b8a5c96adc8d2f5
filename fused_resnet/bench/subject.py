"""The interface between a benchmark's target and the worker that imports it.

A separate module, because a worker runs as ``__main__``: a class defined there would differ from
the one that a target imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class UnavailableError(Exception):
    """A provider cannot run here, because a package or a device is missing."""


class Subject(NamedTuple):
    """The result of a target.

    Attributes:
        call: One timed iteration.
        error: Computes the relative L2 error of its result; called once, before the timing.
        threads: Number of threads of its own pool; None if it runs on PyTorch's.
        training: Whether the call needs gradients; otherwise it runs in inference mode.
        details: Measures further numbers about the call, by name; called once, after the rounds.
    """

    call: Callable[[], Any]
    error: Callable[[], float]
    threads: int | None = None
    training: bool = False
    details: Callable[[], dict[str, float]] | None = None
