"""Times of calls on rotating operands, on a GPU by CUDA graphs. Needs no built extension.

A provider is a list of calls, each on operands of its own, together larger than the L2 cache: a
call finds its maps in memory, as in a network. The calls are captured in a graph, results included,
so that no Python code and no allocation is in the time; providers take turns, so that the clock's
drift affects all equally. What cannot be captured is timed by events around its calls, and says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..results import quantile
from .cases import Row, Target, line

Call = Callable[[], Any]

#: Seconds of a turn, the most calls in a graph, and the number of turns.
TURN, MOST_CALLS, TURNS = 0.004, 128, 7

#: Caches' worth of memory that the operands of a provider's calls fill together, and the most sets.
CACHES, MOST_SETS = 3, 8


def sets(target: Target, size: int) -> int:
    """How many sets of operands a provider rotates over.

    Args:
        target: Device and sizes to run on.
        size: Bytes that one call reads and writes.
    """
    if not target.is_card:
        return 2
    cache = torch.cuda.get_device_properties(target.device).L2_cache_size
    return max(2, min(MOST_SETS, -(-CACHES * cache // max(size, 1))))


class _Events:
    """Calls that are launched one by one."""

    captured = False

    def __init__(self, calls: Sequence[Call], count: int) -> None:
        self.calls, self.count = calls, count

    def run(self) -> None:
        kept: list[Any] = [None] * len(self.calls)
        for i in range(self.count):
            kept[i % len(kept)] = self.calls[i % len(kept)]()


class _Graph:
    """Calls that were captured."""

    captured = True

    def __init__(self, calls: Sequence[Call], count: int, pool: Any) -> None:
        self.count = count
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            kept: list[Any] = [None] * len(calls)
            for i in range(count):
                kept[i % len(kept)] = calls[i % len(kept)]()

    def run(self) -> None:
        self.graph.replay()


def warm_up(calls: Sequence[Call], target: Target) -> float:
    """Make each call twice, which compiles and allocates, and estimate the seconds of one.

    Args:
        calls: Calls of one provider.
        target: Device and sizes to run on.
    """
    if target.tiny:  # an emulation takes long, and compiles nothing; the first call is timed next
        for call in calls[1:]:
            call()
        return 1.0
    if not target.is_card:
        for call in calls:
            call()
        began = time.perf_counter()
        calls[0]()
        return time.perf_counter() - began
    stream = torch.cuda.Stream(target.device)  # a capture is not possible on the default stream
    stream.wait_stream(torch.cuda.current_stream(target.device))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        start.record()
        for call in calls:
            call()
        end.record()
    end.synchronize()
    torch.cuda.current_stream(target.device).wait_stream(stream)
    return start.elapsed_time(end) / 1e3 / len(calls)


def times(
    providers: Mapping[str, Sequence[Call]],
    target: Target,
    capture: bool = True,
    turn: float = TURN,
) -> dict[str, Row]:
    """Seconds of a call of each provider, in turns.

    Args:
        providers: Calls of each provider, by its name.
        target: Device and sizes to run on.
        capture: Whether to capture them; if not, the time has what Python takes to launch them.
        turn: Seconds of a turn.

    Returns:
        By name ``seconds``, of one call in each turn, and ``graph``, whether it was captured; or
        ``error``, one line, for a provider that failed.
    """
    pool = torch.cuda.graph_pool_handle() if target.is_card else None
    found: dict[str, Row] = {}
    runs: dict[str, _Events | _Graph] = {}
    for name, calls in providers.items():
        try:
            each = warm_up(calls, target)
            rounds = round(turn / max(each, 1e-7) / len(calls))
            count = len(calls) * max(1, min(MOST_CALLS // len(calls), rounds))
            runs[name] = _Events(calls, 1 if target.tiny else count)
            found[name] = {"seconds": [], "graph": False}
            if target.is_card and capture:
                try:
                    runs[name] = _Graph(calls, count, pool)
                except RuntimeError as error:
                    found[name]["capture"] = line(error)
                    torch.cuda.synchronize(target.device)  # raises if the device is lost
            found[name]["graph"] = runs[name].captured
        except RuntimeError as error:
            if target.lost():
                raise
            runs.pop(name, None)
            found[name] = {"error": line(error)}
    for number in range(1 if target.tiny else TURNS):
        names = list(runs)
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                seconds = _once(runs[name], target) / runs[name].count
            except RuntimeError as error:
                if target.lost():
                    raise
                runs.pop(name)
                found[name] = {"error": line(error)}
            else:
                found[name]["seconds"].append(seconds)
    return found


def _once(run: _Events | _Graph, target: Target) -> float:
    if not target.is_card:
        began = time.perf_counter()
        run.run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run.run()  # another provider ran before
    start.record()
    run.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(found: Row, unit: str) -> Row:
    """The keys of a ``time`` row.

    Args:
        found: Times of one provider, from :func:`times`.
        unit: ``"us"`` or ``"ms"``.
    """
    if "error" in found:
        return {"status": "failed", "reason": f"while timed: {found['error']}"}
    scale = {"us": 1e6, "ms": 1e3}[unit]
    seconds = found["seconds"]
    row: Row = {"unit": unit, "graph": found["graph"], "samples": len(seconds)}
    row |= {"median": statistics.median(seconds) * scale}
    row |= {"p20": quantile(seconds, 0.2) * scale, "p80": quantile(seconds, 0.8) * scale}
    return row if "capture" not in found else {**row, "capture": found["capture"]}
