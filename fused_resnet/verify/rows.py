"""How an error is measured and judged: one rule for operations and networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: The largest ratio of our error to PyTorch's own that passes.
LIMIT = 1.5

#: Errors of up to this many units of the dtype's eps are rounding, and pass whatever the ratio: the
#: ratio of two such numbers is chance.
ROUNDING = 2.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One verdict.

    Attributes:
        subject: The operation or network.
        mode: ``inference``, ``training``, ``backward``, ...
        dtype: Storage type, without ``torch.``.
        memory_format: ``channels_last`` or ``contiguous``.
        what: What came closest to its bound: a case and the tensor compared.
        error: Relative L2 error against float64.
        pytorch_error: That of the unfused run in the same dtype; None in float64, where the unfused
            run is the truth.
        ratio: The first over the second; None where the second is None or zero.
        bound: The largest error that passes.
        passed: The verdict.
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
        """For JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor, or several taken together, of one case."""

    what: str
    error: float
    pytorch_error: float | None
    bound: float

    @property
    def closeness(self) -> float:
        """Error over bound: what does not pass is above 1, or not a number."""
        return self.error / self.bound


def relative_error(answer: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    r"""Relative L2 error :math:`\|a - t\| / \|t\|` of all tensors taken as one vector.

    Computed in float64; not a number if an answer holds one.
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
    """Hold an error against PyTorch's own in the same dtype."""
    bound = max(LIMIT * pytorch_error, ROUNDING * torch.finfo(dtype).eps)
    return Comparison(what, error, pytorch_error, bound)


def worst(
    comparisons: Iterable[Comparison],
    subject: str,
    mode: str,
    dtype: torch.dtype,
    memory_format: str,
) -> Row:
    """The row of the comparison that came closest to its bound."""
    # A NaN compares false with everything, so it is looked for by name.
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
