"""``fused-resnet verify --matrix``: every operation on every backend, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..backends.availability import NAMES
from ..bench import environment
from ..verify.matrix import LINES, Cell, Runners, verify_matrix
from ..verify.rows import LIMIT, ROUNDING
from ._common import progress


def measure(dtypes: Sequence[torch.dtype], runners: Runners | None = None) -> list[Cell]:
    """All cells, with a progress bar.

    Args:
        dtypes: Storage types.
        runners: What runs the kernels of each backend, by the backend's name; None for the devices
            of this machine.
    """
    with progress() as bar:
        task = bar.add_task("verify", total=len(LINES) * len(dtypes) * len(NAMES))
        return list(
            verify_matrix(
                dtypes, runners, lambda what: bar.update(task, description=what, advance=1)
            )
        )


def document(cells: Sequence[Cell]) -> dict[str, Any]:
    """The cells, the bounds and the environment as a dictionary for JSON."""
    return {
        "passed": all(cell.passed for cell in cells),
        "limit": LIMIT,
        "rounding": ROUNDING,
        "environment": environment.describe(),
        "cells": [cell.as_dict() for cell in cells],
    }


def table(cells: Sequence[Cell]) -> Group:
    """The table, and below it the reasons of the cells that failed or did not run."""
    shown = Table(
        title="error against float64, in brackets over PyTorch's own in the same dtype",
        title_justify="left",
    )
    for name in ("operation", "mode", "dtype"):
        shown.add_column(name)
    for at, backend in enumerate(NAMES):
        ran = dict.fromkeys(cell.runner for cell in cells[at :: len(NAMES)] if cell.runner)
        shown.add_column(f"{backend}\n{', '.join(ran) or 'nothing ran'}")
    reasons = dict.fromkeys(cell.reason for cell in cells if cell.reason)
    notes = {reason: number for number, reason in enumerate(reasons, 1)}
    last = ""
    for at in range(0, len(cells), len(NAMES)):
        line = cells[at : at + len(NAMES)]
        first = line[0]
        if last not in ("", first.operation):
            shown.add_section()
        last = first.operation
        shown.add_row(first.operation, first.mode, first.dtype, *(_text(c, notes) for c in line))
    lines = [Text(f"({number}) {reason}") for reason, number in notes.items()]
    failed = sum(not cell.passed for cell in cells)
    style = "bold red" if failed else "bold green"
    lines.append(Text(f"{len(cells)} cells, {failed} failed or not run", style=style))
    return Group(shown, *lines)


def _text(cell: Cell, notes: dict[str, int]) -> Text:
    words = str(cell) + (f" ({notes[cell.reason]})" if cell.reason else "")
    return Text(words, style="" if cell.passed else "bold red")
