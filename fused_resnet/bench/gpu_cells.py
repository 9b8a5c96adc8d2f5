"""Groups of providers that are measured together in one process, and what comes of each.

A *cell* is one kernel of the roofline, or one network at one batch and precision. On a GPU its
providers share a process: they have no thread pools that steal from each other, and take turns.
What one of them can break is the process's CUDA context: then the answer says so, and the caller
begins a new process with those that are left (see ``benchmarks/gpu.py``).
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

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
    """cuDNN picks its fastest algorithm, and float32 products are tf32 or not, as is asked."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, *(precision == "tf32",) * 2
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


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
    """Build each provider, check its answer, time all that passed.

    Args:
        providers: What builds each, by name.
        clock: Of the device.
        limit: The largest relative error with which one is timed.
        scale: Of the unit in a second.
        unit: Behind ``median_``, ``p20_`` and ``p80_``.
        rounds: As in :func:`fused_resnet.bench.clock.alternating`.
        round_seconds: See there.

    Returns:
        ``rows`` by provider. Those without one remain to be measured: an error of another, or of
        one of them, came in between. ``lost`` says whether it left the device unusable.
    """
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()  # what the cell before this one has left
    rows: dict[str, Row] = {}
    calls = {}
    for name, build in providers.items():
        row: Row = {"status": "ok", "reason": "", "error": None}
        try:
            subject = build()
            error = subject.error()
            row["error"] = error if math.isfinite(error) else None  # JSON has no NaN
            if not error <= limit:  # written so that a NaN is wrong as well
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
            # What was built before is not to blame, and not yet timed.
            return {"rows": {name: row}, "lost": True}
    try:
        times = alternating(clock, calls, rounds=rounds, round_seconds=round_seconds)
    except Exception as error:
        if len(calls) == 1:  # and no other can be to blame
            row = rows[next(iter(calls))]
            row |= {"status": "failed", "reason": f"while timed: {one_line(error)}"}
            calls = {}
        left = {name: row for name, row in rows.items() if name not in calls}
        return {"rows": left, "lost": lost(clock.device)}
    for name, seconds in times.items():
        rows[name] |= {
            f"median_{unit}": statistics.median(seconds) * scale,
            f"p20_{unit}": quantile(seconds, 0.2) * scale,
            f"p80_{unit}": quantile(seconds, 0.8) * scale,
            "samples": len(seconds),
        }
    return {"rows": rows, "lost": False}


def lost(device: torch.device) -> bool:
    """Whether the device's context can't be used any more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def one_line(error: BaseException) -> str:
    """The first line of an error, with its class."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
