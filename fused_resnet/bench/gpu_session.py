"""The measuring of many cells in child processes, whatever single ones of them break.

A provider that fails is a row that says so. One that takes the process or its CUDA context with it
costs that process: the next begins with the providers that have no row yet, one by one where it is
not known whose fault it was. What the time does not suffice for is a row that says that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .harness import Worker, WorkerError

Row = dict[str, Any]
Cell = dict[str, Any]

#: Seconds that a cell must at least have left to be begun.
LEAST_SECONDS = 3.0


def measure_cells(
    target: str,
    cells: Sequence[Cell],
    *,
    seconds: float,
    cell_seconds: float = 120.0,
    threads: int = 8,
    begun: Callable[[Cell, list[str]], None] = lambda cell, providers: None,
) -> list[Row]:
    """Ask a target for each cell and gather the rows.

    Args:
        target: ``module:function``, called with a cell as keyword arguments; answers as
            :func:`fused_resnet.bench.gpu_cells.measure`, with complete rows.
        cells: Keyword arguments; ``providers`` is the list of those to measure.
        seconds: For all of them.
        cell_seconds: After which the process of one cell is ended.
        threads: Of the child process.
        begun: Told of each cell and its providers.
    """
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    worker: Worker | None = None
    try:
        for cell in cells:
            waiting = [list(cell["providers"])]
            while waiting:
                group = waiting.pop(0)
                left = deadline - time.monotonic()
                if left < LEAST_SECONDS:
                    rows += [_row(cell, name, "skipped", "the time was up") for name in group]
                    continue
                begun(cell, group)
                worker = worker or Worker(threads)
                worker.timeout = min(cell_seconds, left)
                try:
                    answer = worker.ask("call", target=target, case={**cell, "providers": group})
                except WorkerError as error:
                    answer = {"rows": [], "lost": True, "reason": str(error)}
                if answer["lost"]:
                    worker.close()
                    worker = None
                rows += answer["rows"]
                answered = {_provider(row) for row in answer["rows"]}
                remaining = [name for name in group if name not in answered]
                if len(remaining) < len(group):
                    waiting[:0] = [remaining] if remaining else []
                elif len(group) > 1:
                    waiting[:0] = [[name] for name in group]
                else:
                    reason = answer.get("reason", "no answer")
                    rows.append(_row(cell, group[0], "failed", reason))
    finally:
        if worker is not None:
            worker.close()
    return rows


def _provider(row: Row) -> str:
    return str(row["provider"]) + ("+graph" if row.get("graph") else "")


def _row(cell: Cell, provider: str, status: str, reason: str) -> Row:
    kind, _, graph = provider.partition("+")
    about = {name: value for name, value in cell.items() if name != "providers"}
    outcome = {"status": status, "reason": reason, "error": None, "bound_us": None}
    return {**about, "provider": kind, "graph": bool(graph), **outcome}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each with ``ratio``: eager's median over its own. None where either is not there."""
    base = {
        _cell(row): row["median_ms"]
        for row in rows
        if row["provider"] == "eager" and not row["graph"] and row["status"] == "ok"
    }
    return [
        {
            **row,
            "ratio": base[_cell(row)] / row["median_ms"]
            if row["status"] == "ok" and _cell(row) in base
            else None,
        }
        for row in rows
    ]


def _cell(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["precision"], row["size"]
