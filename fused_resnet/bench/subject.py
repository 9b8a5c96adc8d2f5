"""What a benchmark's target gives to the worker that imported it.

A module of its own, because a worker runs as ``__main__``: classes defined there would be others
than those that a target imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class UnavailableError(Exception):
    """A provider that cannot run here, for want of a package or a device: no fault of its own."""


class Subject(NamedTuple):
    """What a target returns.

    Attributes:
        call: One iteration of what is timed.
        error: Relative L2 error of its answer; computed once, before anything is timed.
        threads: Of a pool of its own; None where it computes on PyTorch's.
        training: Whether the call needs gradients; else it runs in inference mode.
        details: More about the call, as numbers by name, measured after all rounds.
    """

    call: Callable[[], Any]
    error: Callable[[], float]
    threads: int | None = None
    training: bool = False
    details: Callable[[], dict[str, float]] | None = None
