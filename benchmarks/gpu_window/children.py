"""Jobs: child processes that work through cases and report rows, whatever single cases break.

A job is a module of cases that :mod:`.child` runs. A child that dies is started again without the
cases that it had finished and the one at which it died; at the deadline it is ended, the case that
ran is marked as cut and the others as skipped. Jobs given together run at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import commands

Row = dict[str, Any]
Sink = Callable[[Row], Any]


@dataclass(frozen=True)
class Job:
    """What one child process works through.

    Attributes:
        name: For the log, and for rows that belong to no case.
        step: Step of its rows.
        module: The module whose ``cases`` it runs.
        options: Keyword arguments of ``cases``, representable in JSON.
        environment: All variables of the process.
        stub: Whether the package is not built yet, and only what needs no build may be imported.
        rehearse: Whether the simulator and the interpreter stand in for the card.
        nice: Added to the niceness of the process.
    """

    name: str
    step: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    stub: bool = False
    rehearse: bool = False
    nice: int = 0

    def command(self, done: Sequence[str], deadline: float) -> list[str]:
        """The command of a process.

        Args:
            done: Cases that are not to be run again.
            deadline: Of ``time.monotonic()``, which all processes of a machine share.
        """
        settings = {"module": self.module, "options": dict(self.options), "done": list(done)}
        settings |= {"deadline": deadline, "stub": self.stub, "rehearse": self.rehearse}
        return [sys.executable, "-m", "gpu_window.child", json.dumps(settings)]


class _Process:
    """One process of a job, and what it has said."""

    def __init__(self, job: Job, done: Sequence[str], deadline: float, log: Path) -> None:
        self.job, self.deadline, self.log = job, deadline, log
        self.current: str | None = None
        self.finished: list[str] = []
        self.left: list[str] | None = None  # nothing is said yet
        self.completed = False
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                job.command(done, deadline),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(job.environment),
                start_new_session=True,
            )
        if job.nice:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.process.pid, job.nice)
        commands.LIVE.add(self.process)

    def lines(self, stop: threading.Event) -> Iterator[dict[str, Any]]:
        """Its messages, until it closes its output, is stopped, or its time is over."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        waiting = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while time.monotonic() < self.deadline and not stop.is_set():
                limit = min(0.2, max(0.0, self.deadline - time.monotonic()))
                if not selector.select(limit):
                    continue
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return
                *whole, waiting = (waiting + part).split(b"\n")
                for line in whole:
                    yield json.loads(line)

    def close(self) -> int:
        """End it if it still runs; its exit code."""
        if self.process.poll() is None and not self.completed:
            commands.end(self.process)
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it has completed, and does not end
            commands.end(self.process)
            return self.process.wait()
        finally:
            commands.LIVE.discard(self.process)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def last_words(self) -> str:
        """The last line that it wrote to its log."""
        text = self.log.read_bytes()[-4000:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"


class Jobs:
    """Jobs that run at the same time.

    Args:
        jobs: They are started at once.
        deadline: Of ``time.monotonic()``, when all are ended.
        sink: Called with each row, by one thread at a time.
        logs: Folder for what the processes print.
    """

    def __init__(self, jobs: Sequence[Job], deadline: float, sink: Sink, logs: Path) -> None:
        self._deadline, self._sink, self._logs = deadline, sink, logs
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._running: set[_Process] = set()
        self._threads = [threading.Thread(target=self._run, args=(job,)) for job in jobs]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all have ended, which is at the deadline at the latest.

        If the wait itself is interrupted they are ended, as none may start another process.
        """
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all of them now; the cases that ran are marked as cut."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let none of them compute meanwhile."""
        with self._lock:
            stopped = list(self._running)
        for one in stopped:
            commands.signal_session(one.process, signal.SIGSTOP)
        try:
            yield
        finally:
            for one in stopped:
                commands.signal_session(one.process, signal.SIGCONT)

    def _add(self, job: Job, row: Row) -> None:
        with self._lock:
            self._sink({"step": job.step, "job": job.name, **row})

    def _run(self, job: Job) -> None:
        try:
            self._work(job)
        except Exception as error:  # of this process: the others go on
            self._add(job, _missing(job.name, "failed", f"{type(error).__name__}: {error}"))

    def _work(self, job: Job) -> None:
        done: list[str] = []
        while True:
            log = self._logs / f"{job.step}-{job.name}.log".replace(" ", "-").replace("/", "-")
            one = _Process(job, done, self._deadline, log)
            with self._lock:
                self._running.add(one)
            try:
                for message in one.lines(self._stop):
                    self._take(one, message)
            finally:
                code = one.close()
                with self._lock:
                    self._running.discard(one)
            over = time.monotonic() >= self._deadline or self._stop.is_set()
            done += one.finished
            if one.current is not None:
                done.append(one.current)
                status = "cut" if over else "failed"
                reason = "its time was over" if over else _died(code, one.last_words())
                self._add(job, _missing(one.current, status, reason))
            if one.completed or (code == 0 and not over):
                break
            left = [name for name in one.left or () if name not in done]
            if over:
                if one.left is None:
                    left = [job.name]
                if left:
                    self._add(job, _left(left))
                break
            if one.current is None and not one.finished:
                self._add(job, _missing(job.name, "failed", _died(code, one.last_words())))
                break
            if not left:
                break

    def _take(self, one: _Process, message: dict[str, Any]) -> None:
        if "cases" in message:
            one.left = list(message["cases"])
        elif "begin" in message:
            one.current = message["begin"]
        elif "end" in message:
            one.finished.append(message["end"])
            one.current = None
        elif "row" in message:
            self._add(one.job, {"case": one.current or one.job.name, **message["row"]})
        elif "left" in message:
            self._add(one.job, _left(message["left"]))
        elif "completed" in message:
            one.completed = True


def _missing(case: str, status: str, reason: str) -> Row:
    return {"kind": "note", "case": case, "status": status, "reason": reason, "summary": reason}


def _left(names: Sequence[str]) -> Row:
    reason = f"the time was up for {len(names)}: {', '.join(names)}"
    return _missing("", "skipped", reason[:2000])


def _died(code: int, last: str) -> str:
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"the process ended {how}: {last}"
