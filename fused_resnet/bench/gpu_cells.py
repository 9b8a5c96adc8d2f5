"""Cells: providers that are measured together in one process.

A *cell* is one kernel of the roofline, or one network at one batch and precision. On a GPU its
providers share a process: they have no competing thread pools, and take turns. A failing provider
may leave the CUDA context unusable: then the result says so, and the caller starts a new process.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..tuning.tf32 import tf32_set_to
from .clock import Clock, alternating
from .results import quantile
from .subject import Subject, UnavailableError

Row = dict[str, Any]

#: Storage types by precision; tf32 and float32 differ in how products are computed.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


@contextlib.contextmanager
def settings(precision: str) -> Iterator[None]:
    """Let cuDNN choose its fastest algorithm, and set tf32 for float32 products.

    Args:
        precision: A key of :data:`DTYPES`.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        with tf32_set_to(precision == "tf32"):
            yield
    finally:
        cudnn.benchmark = before


def measure(
    providers: Mapping[str, Callable[[], Subject]],
    clock: Clock,
    limit: float,
    scale: float,
    unit: str,
    *,
    rounds: int = 5,
    round_seconds: float = 0.02,
) -> dict[str, Any]:
    """Build each provider, check its result, and time those that passed.

    Args:
        providers: The functions that build them, by name.
        clock: The clock of the device.
        limit: The largest relative error at which a provider is timed.
        scale: Units in a second.
        unit: Suffix of ``median_``, ``p20_`` and ``p80_``.
        rounds: Number of turns of each provider.
        round_seconds: Length of a turn.

    Returns:
        ``rows`` by provider. Providers without a row were not measured, because an error occurred
        before. ``lost`` says whether the device became unusable.
    """
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()  # of the previous cell
    rows: dict[str, Row] = {}
    calls = {}
    for name, build in providers.items():
        row: Row = {"status": "ok", "reason": "", "error": None}
        try:
            subject = build()
            error = subject.error()
            row["error"] = error if math.isfinite(error) else None  # JSON has no NaN
            if not error <= limit:  # negated, so that a NaN is wrong too
                row["status"] = "wrong"
                row["reason"] = f"relative error {error:.1e}, limit {limit:.1e}"
        except UnavailableError as why:
            row |= {"status": "unavailable", "reason": str(why)}
        except Exception as why:
            row |= {"status": "failed", "reason": one_line(why)}
        rows[name] = row
        if row["status"] == "ok":
            calls[name] = subject.call
        elif lost(clock.device):
            # Those built before have not failed, and are not timed yet.
            return {"rows": {name: row}, "lost": True}
    try:
        times = alternating(clock, calls, rounds=rounds, round_seconds=round_seconds)
    except Exception as error:
        if len(calls) == 1:  # so it is the one that failed
            row = rows[next(iter(calls))]
            row |= {"status": "failed", "reason": f"while timed: {one_line(error)}"}
            calls = {}
        untimed = {name: row for name, row in rows.items() if name not in calls}
        return {"rows": untimed, "lost": lost(clock.device)}
    for name, seconds in times.items():
        rows[name] |= {
            f"median_{unit}": statistics.median(seconds) * scale,
            f"p20_{unit}": quantile(seconds, 0.2) * scale,
            f"p80_{unit}": quantile(seconds, 0.8) * scale,
            "samples": len(seconds),
        }
    return {"rows": rows, "lost": False}


def lost(device: torch.device) -> bool:
    """Whether the device's context has become unusable.

    Args:
        device: Device to check; the result is False for any that is not CUDA.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def one_line(error: BaseException) -> str:
    """The first line of an error, with its class.

    Args:
        error: The exception.
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
