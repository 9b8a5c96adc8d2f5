"""Measures many cells in child processes, and survives failures of single ones.

The row of a failed provider says so. If the process or its CUDA context is lost, a new process
measures the providers without a row, one at a time if it is not known which one failed. The rows
of cells for which there is no time left are marked as skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .harness import Worker, WorkerError

Row = dict[str, Any]
Cell = dict[str, Any]

#: Seconds that must remain for a cell to be started.
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
    """Call a target for each cell and collect the rows.

    Args:
        target: ``module:function``, called with a cell as keyword arguments; returns the result of
            :func:`fused_resnet.bench.gpu_cells.measure`, with complete rows.
        cells: Keyword arguments; ``providers`` is the list of those to measure.
        seconds: Time limit of all cells.
        cell_seconds: Time limit of one cell, after which its process is killed.
        threads: Number of threads of the child process.
        begun: Called before each cell with the cell and its providers.
    """
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    worker: Worker | None = None
    try:
        for cell in cells:
            waiting = [list(cell["providers"])]
            while waiting:
                group = waiting.pop(0)
                remaining_seconds = deadline - time.monotonic()
                if remaining_seconds < LEAST_SECONDS:
                    rows += [_row(cell, name, "skipped", "the time was up") for name in group]
                    continue
                begun(cell, group)
                worker = worker or Worker(threads)
                worker.timeout = min(cell_seconds, remaining_seconds)
                try:
                    case = {**cell, "providers": group}
                    answer = worker.request("call", target=target, case=case)
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
    """The rows with ``ratio``: eager's median over their own; None where either is missing.

    Args:
        rows: Rows of networks.
    """
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
