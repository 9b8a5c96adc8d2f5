"""How errors are measured, and the bound that they must keep, for operations and networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: The largest ratio of our error to PyTorch's own that passes.
LIMIT = 1.5

#: Errors up to this many times the dtype's eps are rounding and pass whatever the ratio, since the
#: ratio of two such numbers is random.
ROUNDING = 2.0


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one check.

    Attributes:
        subject: The operation or network.
        mode: ``inference``, ``training``, ``backward``, ...
        dtype: Storage type, without ``torch.``.
        memory_format: ``channels_last`` or ``contiguous``.
        what: The case and the tensor whose error is closest to its bound.
        error: Relative L2 error against float64.
        pytorch_error: Error of the unfused run in the same dtype; None in float64, where the
            unfused run is the truth.
        ratio: ``error / pytorch_error``; None if that is None or zero.
        bound: The largest error that passes.
        passed: Whether ``error`` is at most ``bound``.
    """

    subject: str
    mode: str
    dtype: str
    memory_format: str
    what: str
    error: float
    pytorch_error: float | None
    ratio: float | None
    bound: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """The row as a dictionary for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The error of one tensor, or of several as one vector, in one case.

    Attributes:
        what: The case and the tensor.
        error: Relative L2 error against float64.
        pytorch_error: Error of the unfused run in the same dtype; None in float64.
        bound: The largest error that passes.
    """

    what: str
    error: float
    pytorch_error: float | None
    bound: float

    @property
    def closeness(self) -> float:
        """Error over bound: above 1, or NaN, for an error that does not pass."""
        return self.error / self.bound


def relative_error(answer: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    r"""Relative L2 error :math:`\|a - t\| / \|t\|` of all tensors as one vector.

    Computed in float64; NaN if a result contains one.

    Args:
        answer: The results.
        truth: The exact results.
    """
    distance = norm = 0.0
    for a, t in zip(answer, truth, strict=True):
        if a.shape != t.shape:
            raise ValueError(f"relative_error: answer: expected {t.shape}, got {a.shape}")
        exact = t.detach().cpu().double()
        distance += float((a.detach().cpu().double() - exact).square().sum())
        norm += float(exact.square().sum())
    if norm == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return (distance / norm) ** 0.5


def compare(what: str, error: float, pytorch_error: float, dtype: torch.dtype) -> Comparison:
    """Compare an error with PyTorch's own in the same dtype.

    Args:
        what: The case and the tensor.
        error: Relative L2 error against float64.
        pytorch_error: Relative L2 error of the unfused run against float64.
        dtype: Storage type.
    """
    bound = max(LIMIT * pytorch_error, ROUNDING * torch.finfo(dtype).eps)
    return Comparison(what, error, pytorch_error, bound)


def worst(
    comparisons: Iterable[Comparison],
    subject: str,
    mode: str,
    dtype: torch.dtype,
    memory_format: str,
) -> Row:
    """The row of the comparison closest to its bound.

    Args:
        comparisons: Comparisons, at least one.
        subject: The operation or network.
        mode: ``inference``, ``training``, ``backward``, ...
        dtype: Storage type.
        memory_format: ``channels_last`` or ``contiguous``.
    """
    # A NaN compares false with everything, so it is ordered first.
    found = max(comparisons, key=lambda c: (c.closeness != c.closeness, c.closeness))
    own = found.pytorch_error
    return Row(
        subject=subject,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        memory_format=memory_format,
        what=found.what,
        error=found.error,
        pytorch_error=own,
        ratio=found.error / own if own else None,
        bound=found.bound,
        passed=found.error <= found.bound,
    )
