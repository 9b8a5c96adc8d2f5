"""A window from its first second to its last: the steps in order, whatever single ones break."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import build, caches, card, commands, sanitizer
from .budget import FIRST, SECOND, Budget
from .children import Job, Jobs
from .document import document, results_format
from .environment import environment
from .rows import Row, RowFile, read
from .steps import Steps
from .worst import worst_layers

ROOT = Path(__file__).resolve().parents[2]


class Window:
    """One run of ``make gpu``.

    Args:
        arguments: See :mod:`.arguments`.
        device: The card, from :func:`.card.describe`.
    """

    def __init__(self, arguments: argparse.Namespace, device: dict[str, Any]) -> None:
        self.arguments, self.device = arguments, device
        self.second = arguments.caches is not None
        self.budget = Budget(SECOND if self.second else FIRST, arguments.seconds)
        self.out: Path = arguments.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work: Path = arguments.work.resolve()
        self.toolkit = card.toolkit()
        self.before: list[Row] = []
        self._prepare_caches()
        self.logs = self.work / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.environment = environment(
            device["capability"], self.work, self.toolkit, rehearse=arguments.rehearse
        )
        self.steps = Steps(self.environment, arguments.rehearse)
        name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        self.stem = self.out / (f"{name}-second" if self.second else name)
        self.archive = self.out / "gpu-caches.tar.xz"
        path = self.stem.with_suffix(".jsonl")
        path.unlink(missing_ok=True)
        self.file = RowFile(path, lambda: self.budget.elapsed)
        self.head: Row = {"device": device, "versions": card.versions(self.toolkit)}
        self.head |= {"commit": arguments.commit or card.commit(), "tune": "forced and auto"}
        self.head |= {"command": shlex.join(["python", *sys.argv])}
        self.head["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def _prepare_caches(self) -> None:
        if self.second:
            rows = caches.restore(self.arguments.caches, self.work)
            self.before = read(rows) if rows else []
        else:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)

    def run(self) -> int:
        """All steps; 0 if nothing failed and no result was wrong."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            (self._second if self.second else self._first)()
        except KeyboardInterrupt:
            self.note("window", "interrupted", "failed", "the window was interrupted")
        finally:
            commands.end_all()
            passed = self.finish()
        return 0 if passed else 1

    def finish(self) -> bool:
        """Write the results file and the summary; whether nothing failed."""
        self.head["seconds"] = round(self.budget.elapsed, 1)
        found, form = document(self.file.rows, self.head), results_format()
        form.save(self.stem.with_suffix(".json"), found)
        text = form.summary(found)
        self.stem.with_suffix(".txt").write_text(text)
        self.file.close()
        print(f"\n{text}\nwritten to {os.path.relpath(self.out)}", flush=True)
        return bool(form.passed(found))

    # Steps

    def _first(self) -> None:
        deadline = self.budget.deadline("build")
        end = self.budget.began + self.budget.seconds
        triton, inductor = (
            Jobs(jobs, end, self.add, self.logs)
            for jobs in (self.steps.triton(), self.steps.inductor())
        )
        try:
            built = self.step("build", lambda end: self._build(end), deadline)
            with triton.paused(), inductor.paused():
                if built:
                    self.step("machine", self._machine)
            # From here on those who check compile what is still missing.
            self._end(triton)
            if built:
                self.step("correctness", self._correctness)
            self._end(inductor)
        finally:
            triton.stop()
            inductor.stop()
        if built:
            self.step("layers", lambda end: self._in_turn(self.steps.layers(), end))
            self.step("networks", lambda end: self._in_turn(self.steps.networks(), end))
            self.step("runtime", lambda end: self._together(self.steps.runtime(), end))
        self.step("sanitizer", lambda end: self._sanitizer(end, built))

    def _end(self, jobs: Jobs) -> None:
        """End what compiles beside other steps; a rehearsal shows that it would have ended."""
        if self.arguments.rehearse:
            jobs.wait()
        jobs.stop()

    def _second(self) -> None:
        if not self.step("build", lambda end: self._build(end)):
            return
        self.step("machine", self._machine)
        self.step("sweep", self._sweep)
        self.step("autotune", lambda end: self._together([self.steps.autotune()], end))
        self.step("archive", lambda end: self._archive())

    def step(self, name: str, run: Callable[[float], Any], deadline: float | None = None) -> Any:
        """One step, by its deadline; what it raises is a row, and the next step goes on.

        Args:
            name: Of the step.
            run: Called with the deadline.
            deadline: Of ``time.monotonic()``; None asks the budget.
        """
        end = self.budget.deadline(name) if deadline is None else deadline
        began = time.monotonic()
        print(f"gpu: {name}: {end - began:.0f} s", flush=True)
        result, status, reason = None, "ok", ""
        try:
            result = run(end)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"[:300]
        spent = time.monotonic() - began
        share = f"{spent:.1f} of {end - began:.1f} s"
        more = {"seconds": round(spent, 2), "share": round(end - began, 2)}
        self.note(name, "step", status, share, reason=reason, **more)
        return result

    def _build(self, end: float) -> bool:
        return build.build(self.environment, end, self.add, rehearse=self.arguments.rehearse)

    def _machine(self, end: float) -> None:
        self._together(self.steps.machine(), end)
        if not self.second:
            sanitizer.tools(
                self.toolkit, self.environment, self.add, rehearse=self.arguments.rehearse
            )

    def _correctness(self, end: float) -> None:
        self._together(self.steps.correctness(), end)

    def _sanitizer(self, end: float, built: bool) -> None:
        # Nothing compiles any more, and the sanitizers leave the cores idle.
        archiving = threading.Thread(target=self._archive)
        archiving.start()
        if built:
            found = sanitizer.find(self.toolkit, "compute-sanitizer")
            program = getattr(self.arguments, "sanitizer", None)
            words = shlex.split(program) if program else [found] if found else None
            sanitizer.run(words, self.environment, end, self.add, self.steps.sanitizer())
        archiving.join()

    def _archive(self) -> None:
        rows = self.work / "all-rows.jsonl"
        found = [*self.before, *self.file.rows]
        try:
            rows.write_text("".join(json.dumps(row) + "\n" for row in found))
            text = caches.save(self.work, rows, self.archive)
        except OSError as error:
            self.note("archive", "caches", "failed", str(error), reason=str(error))
        else:
            self.note("archive", "caches", "ok", text)

    def _sweep(self, end: float) -> None:
        whats = worst_layers(self.before)
        if self.arguments.rehearse:
            whats = [row["what"] for row in self.before if row.get("fusion") == "conv"][:1]
        self.note("sweep", "layers", "ok", "; ".join(whats))
        middle = time.monotonic() + 0.4 * max(0.0, end - time.monotonic())
        self._together(self.steps.sweep_compilers(whats), middle)
        self._together([self.steps.sweep(whats)], end)

    def _together(self, jobs: Sequence[Job], end: float) -> None:
        Jobs(jobs, end, self.add, self.logs).wait()

    def _in_turn(self, jobs: Sequence[tuple[float, Job]], end: float) -> None:
        for part, job in jobs:
            now = time.monotonic()
            self._together([job], now + part * max(0.0, end - now))

    # Rows

    def add(self, row: Row) -> None:
        """Write a row, and say on the terminal what is not ok.

        Args:
            row: Without its time.
        """
        row = self.file.add(row)
        if row["status"] not in ("ok", "skipped", "unavailable"):
            what = row.get("what") or row.get("test") or row["case"]
            who = " ".join(str(row[key]) for key in ("backend", "provider", "plan") if key in row)
            print(
                f"gpu:   {row['step']}: {what} {who}: {row['status']}: {row['reason']}", flush=True
            )

    def note(self, step: str, case: str, status: str, summary: str, **more: Any) -> None:
        """Write a row of the kind ``note``.

        Args:
            step: Name of the step.
            case: What of it.
            status: A status of :mod:`.rows`.
            summary: One line.
            **more: Further keys.
        """
        row = {"kind": "note", "step": step, "case": case, "status": status, "summary": summary}
        if status != "ok":
            row["reason"] = more.pop("reason", "") or summary
        more.pop("reason", None)
        self.add({**row, **more})


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
