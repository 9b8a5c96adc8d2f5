"""What the subcommands print: consoles that cut no number, and progress with and without a bar."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

#: Columns where there is no terminal to ask.
COLUMNS = 80

#: Seconds between two lines of progress where there is no terminal.
EVERY = 10.0


class Output(Console):
    """A console for stdout that is as wide as a table needs, so that no number is cut.

    Where stdout is no terminal it has 80 columns (or ``COLUMNS``), writes no spaces at the ends of
    lines, and no colours. ``NO_COLOR`` is kept.
    """

    def __init__(self) -> None:
        piped = not sys.stdout.isatty()
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() and int(columns) > 0 else COLUMNS
        super().__init__(width=width if piped else None, file=io.StringIO() if piped else None)
        self._piped = piped

    @property
    def is_terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return not getattr(self, "_piped", True) and super().is_terminal

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as :class:`rich.console.Console` does.

        Args:
            objects: Objects to print.
            options: Options of ``Console.print``.
        """
        before = self.width
        for table in objects:
            if isinstance(table, Table):
                self.width = max(self.width, self._needed(table))
        super().print(*objects, **options)
        self.width = before
        if self._piped:
            text = self.file.getvalue()  # type: ignore[attr-defined]
            self.file.seek(0)
            self.file.truncate()
            sys.stdout.write("\n".join(line.rstrip() for line in text.split("\n")))

    def _needed(self, table: Table) -> int:
        """The least width, of those that are no less than the console's, that cuts no cell."""

        def cut(width: int) -> int:
            options = self.options.update(width=width)
            return sum(segment.text.count("…") for segment in self.render(table, options))

        unbounded = 10000
        measured = Measurement.get(self, self.options.update(width=unbounded), table)
        width, whole = max(self.width, measured.minimum), cut(unbounded)
        while width < measured.maximum and cut(width) > whole:
            width += 1
        return width


class Lines(Progress):
    """Progress as a line on stderr now and then, where there is no terminal for a bar."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._printed = time.monotonic()

    def update(self, task_id: Any, **changes: Any) -> None:
        """Advance a task, and print a line if the last one is some seconds old.

        Args:
            task_id: The task.
            changes: Changes to the task, as keyword arguments of ``Progress.update``.
        """
        super().update(task_id, **changes)
        now = time.monotonic()
        if now - self._printed >= EVERY:
            self._printed = now
            task = self._tasks[task_id]
            total = "" if task.total is None else f"/{task.total:.0f}"
            print(
                f"fused-resnet: {task.description} ({task.completed:.0f}{total})",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr, or a line now and then if that is not a terminal."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        yield bar
