"""Test files as cases: each test is a row the moment it ends. A child runs this module.

A file runs in this process, so that a failure which leaves the CUDA context unusable ends the
process and the next file has a new one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest

from fused_resnet.bench.gpu.cases import Case, Row, Target, line

ROOT = Path(__file__).resolve().parents[2]


def cases(target: Target, files: Sequence[str], arguments: Sequence[str] = ()) -> list[Case]:
    """A case for each file.

    Args:
        target: Where the tests run.
        files: Paths from the root of the repository.
        arguments: Further arguments of pytest.
    """
    return [Case(name, functools.partial(_run, target, name, arguments)) for name in files]


class _Reporter:
    """Puts a row for each test into a queue."""

    def __init__(self, rows: SimpleQueue[Row | None]) -> None:
        self.rows = rows
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        ended = {"call": True, "setup": not report.passed, "teardown": report.failed}
        if ended[report.when]:
            self._put(report, seconds)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed or (report.skipped and report.longrepr):
            self._put(report, 0.0)

    def _put(self, report: Any, seconds: float) -> None:
        row: Row = {"kind": "test", "test": report.nodeid, "seconds": round(seconds, 3)}
        if report.passed:
            self.rows.put({**row, "status": "ok"})
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else "skipped"
            self.rows.put({**row, "status": "skipped", "reason": str(reason)})
        else:
            text = str(report.longrepr).splitlines()
            errors = [part for part in text if part.startswith("E ")]
            log = [*errors[:10], *text[-20:]]
            reason = (errors or text or ["failed"])[0].removeprefix("E").strip()
            self.rows.put({**row, "status": "failed", "reason": reason[:300], "log": log})


def _run(target: Target, name: str, arguments: Sequence[str]) -> Iterator[Row]:
    """The rows of a file. pytest runs in a thread that yields them through a queue."""
    rows: SimpleQueue[Row | None] = SimpleQueue()
    os.chdir(ROOT)

    def run() -> None:
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", name, *arguments]
        try:
            code = pytest.main(options, plugins=[_Reporter(rows)])
            if code == pytest.ExitCode.NO_TESTS_COLLECTED:
                reason = {"status": "skipped", "reason": "no test was collected"}
                rows.put({"kind": "test", "test": name, "seconds": 0.0, **reason})
            elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                reason = {"status": "failed", "reason": f"pytest ended with {code!r}"}
                rows.put({"kind": "test", "test": name, "seconds": 0.0, **reason})
        except BaseException as error:
            reason = {"status": "failed", "reason": line(error)}
            rows.put({"kind": "test", "test": name, "seconds": 0.0, **reason})
        finally:
            rows.put(None)

    thread = Thread(target=run)
    thread.start()
    while (row := rows.get()) is not None:
        yield row
    thread.join()
    if target.lost():
        raise RuntimeError("the CUDA context is unusable after this file")
