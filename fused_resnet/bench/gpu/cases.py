"""Cases, the rows that they yield, and the target that they run on. Needs no built extension."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..subject import UnavailableError

__all__ = ["Case", "Row", "Target", "UnavailableError", "card_target", "failed", "unavailable"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A piece of work that is lost if its process dies.

    Attributes:
        name: Unique in its module.
        run: Yields its rows, each when it is known.
        about: Keys that all rows of the case have, so that a failure has them too.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    about: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """Where cases run.

    Attributes:
        device: Device of all tensors.
        tiny: Whether sizes are those of a rehearsal, in which only the code paths count.
        operators: A context that gives the operators of a backend, by its name.
        forced: A context that forces a backend for this package's functions, by its name;
            ``"auto"`` leaves the choice as it is.
    """

    device: torch.device
    tiny: bool
    operators: Callable[[str], AbstractContextManager[Any]]
    forced: Callable[[str], AbstractContextManager[Any]]

    @property
    def is_card(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_card:
            torch.cuda.synchronize(self.device)

    def lost(self) -> bool:
        """Whether the device's context has become unusable."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def generator(self) -> torch.Generator:
        """The source of the operands, the same numbers in every process."""
        return torch.Generator(self.device).manual_seed(0)


def card_target() -> Target:
    """The current CUDA device, with the backends as a user forces them."""
    return Target(torch.device("cuda"), False, _operators, _forced)


@contextlib.contextmanager
def _operators(backend: str) -> Iterator[Any]:
    from ...backends.availability import backends
    from ...ops.registry import OPERATORS

    status = backends()[backend]
    if not status:
        raise UnavailableError(status.reason)
    yield OPERATORS[backend]


@contextlib.contextmanager
def _forced(backend: str) -> Iterator[None]:
    from ...backends.availability import BackendUnavailable, use_backend

    if backend == "auto":  # which is what runs outside of any context too
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(use_backend(backend))
        except BackendUnavailable as error:
            raise UnavailableError(str(error)) from None
        yield


def failed(case: Case, error: BaseException) -> Row:
    """The row of a case that raised.

    Args:
        case: The case.
        error: Exception that the case raised.
    """
    return {"kind": "note", "summary": "", **case.about, "status": "failed", "reason": line(error)}


def unavailable(case: Case, reason: str) -> Row:
    """The row of a case that cannot run here.

    Args:
        case: The case.
        reason: What the case needs and this machine lacks.
    """
    row = {"kind": "note", "summary": "", **case.about}
    return row | {"status": "unavailable", "reason": reason or "unavailable"}


def note(summary: str, **more: Any) -> Row:
    """A row of something that is known.

    Args:
        summary: One line.
        **more: Further keys.
    """
    return {"kind": "note", "status": "ok", "summary": summary, **more}


def line(error: BaseException) -> str:
    """The first line of an error, with its class.

    Args:
        error: Any exception.
    """
    text = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
