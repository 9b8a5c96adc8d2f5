"""A cell: several providers of one result, checked against one truth and timed in turns.

Needs no built extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import gpu_cells
from . import timing
from .accuracy import relative
from .cases import Row, Target, UnavailableError, line

Call = Callable[[], Any]
#: Makes a provider's calls, one for each set of operands.
Build = Callable[[], Sequence[Call]]

#: Relative error beyond which a provider is not timed. Wide, to tell wrong results from rounded
#: ones: the step ``correctness`` is the sharp test.
LIMITS = {"float32": 1e-4, "tf32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}


def cell(
    target: Target,
    builds: Mapping[str, Build],
    error: Callable[[Any], float],
    limit: float,
    about: Row,
    unit: str = "us",
    errors: Mapping[str, Callable[[Any], float]] | None = None,
) -> Iterator[Row]:
    """Build each provider, check the result of its first call, and time those that are right.

    Args:
        target: Device and sizes to run on.
        builds: The functions that make their calls, by name.
        error: The error of a first call's result.
        limit: The largest error at which a provider is timed.
        about: Keys of all rows.
        unit: ``"us"`` or ``"ms"``.
        errors: The errors of providers that compute something else, by name.
    """
    # cuDNN chooses its fastest algorithm, as the tuner does for ours.
    with gpu_cells.settings(about.get("precision", "float32")):
        yield from _cell(target, builds, error, limit, about, unit, errors or {})
    if target.is_card:
        torch.cuda.empty_cache()


def _cell(
    target: Target,
    builds: Mapping[str, Build],
    error: Callable[[Any], float],
    limit: float,
    about: Row,
    unit: str,
    errors: Mapping[str, Callable[[Any], float]],
) -> Iterator[Row]:
    right: dict[str, Sequence[Call]] = {}
    found_errors: dict[str, float] = {}
    for name, build in builds.items():
        row: Row = {"kind": "time", **about, "provider": name}
        try:
            calls = build()
            found = errors.get(name, error)(calls[0]())
        except UnavailableError as why:
            yield row | {"status": "unavailable", "reason": str(why)}
            continue
        except Exception as why:
            yield row | {"status": "failed", "reason": line(why)}
            if target.lost():
                raise
            continue
        if found <= limit:  # False for a NaN
            right[name], found_errors[name] = calls, found
        else:
            reason = f"relative error {found:.1e}, limit {limit:.1e}"
            yield row | {"status": "wrong", "reason": reason, "unit": unit}
    for name, found_times in timing.times(right, target).items():
        row = {"kind": "time", **about, "provider": name, "status": "ok"}
        yield row | {"error": found_errors[name]} | timing.summary(found_times, unit)


def error_against(truth: Tensor) -> Callable[[Any], float]:
    """The error of a result's first images; a sequence's first tensor is the one that is compared.

    Args:
        truth: Result in float64 for those images.
    """

    def error(result: Any) -> float:
        y = result if isinstance(result, Tensor) else result[0]
        return relative(y[: truth.shape[0]], truth)

    return error
