"""The harness of the benchmarks: providers take turns, each in a process of its own.

Two thread pools in one process compete for the cores (measured: a factor of two), and a provider
that patches or configures torch must not affect the next one; hence one process each. The speed of
a shared machine drifts by more than the differences of interest; hence alternating rounds, so that
drift affects all providers equally, and ratios of medians from the same run. Only one process
computes at a time; the others wait on a pipe. A wrong result is not timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

#: Target duration of a round of one provider, and duration of its warm-up, in seconds.
ROUND_SECONDS = 0.5
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """One provider of a comparison.

    Attributes:
        name: Name of the provider in the table.
        target: ``module:function`` that builds the provider and returns a
            :class:`fused_resnet.bench.subject.Subject`.
        case: Keyword arguments of that function, representable in JSON.
        limit: The largest relative error at which it is timed.
    """

    name: str
    target: str
    case: dict[str, Any]
    limit: float


@dataclass
class Measurement:
    """The outcome of one provider.

    Attributes:
        name: The entry's name.
        status: ``"ok"``, ``"wrong"`` (error beyond its limit), ``"failed"`` or ``"unavailable"``.
        reason: One line if the status is not ok.
        error: Relative L2 error of its result, if it computed one.
        threads: Number of threads of its pool.
        cpu_seconds: Processor time of all its threads in the rounds.
        peak_bytes: Peak resident memory of its process after the build, PyTorch's libraries
            included; None where the system does not report it.
        base_bytes: Resident memory of the process before the build: those libraries.
        build_seconds: Time from import to the first result.
        times: Seconds of each timed iteration.
        rounds: Begin and end of each round, on the clock that all processes share.
        details: Further numbers about the subject, by name.
    """

    name: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    threads: int | None = None
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None
    base_bytes: int | None = None
    build_seconds: float | None = None
    times: list[float] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)


class WorkerError(Exception):
    """A request failed.

    Args:
        status: ``"failed"`` or ``"unavailable"``.
        reason: What the worker said.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Worker:
    """A child process that serves one request at a time.

    Args:
        threads: Size of its thread pool.
        timeout: Seconds after which an unanswered request kills the process.
    """

    def __init__(self, threads: int, timeout: float = 900.0) -> None:
        self.timeout = timeout
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fused_resnet.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            # A Ctrl-C in the terminal goes to the parent alone, which then closes its workers.
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            do: Name of the request; :mod:`fused_resnet.bench.worker` lists them.
            arguments: Arguments of the call, representable in JSON.

        Raises:
            WorkerError: The worker answered with a failure, died, or did not answer in time.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise self._died() from None
        answer: dict[str, Any] = json.loads(self._read_line())
        for status in ("failed", "unavailable"):
            if status in answer:
                raise WorkerError(status, answer[status])
        return answer

    def close(self) -> None:
        """Close the pipe and, if the process does not exit, kill it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
        process.stdout.close()
        self._stderr.close()

    def _read_line(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + self.timeout
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                raise WorkerError("failed", f"no answer within {self.timeout:g} s")
            part = os.read(stdout.fileno(), 65536)
            if not part:
                raise self._died()
            line += part
        return line

    def _kill(self) -> None:
        # Its session includes its own children, such as the compilers of torch.compile.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _died(self) -> WorkerError:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return WorkerError("failed", f"worker ended with {how}{last}")


#: Called with a provider's name and what it is doing, before each step.
Progress = Callable[[str, str], None]


def steps(entries: Sequence[Entry], rounds: int) -> int:
    """The largest number of times that :func:`compare` calls its progress function.

    Args:
        entries: The providers.
        rounds: Number of rounds.
    """
    return len(entries) * (2 + rounds)


def compare(
    entries: Sequence[Entry],
    *,
    threads: int,
    rounds: int = 10,
    round_seconds: float = ROUND_SECONDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
    jobs: int = 1,
    progress: Progress = lambda name, action: None,
    timeout: float = 900.0,
) -> list[Measurement]:
    """Build every entry in its own process, check its result, time all in alternating rounds.

    Args:
        entries: The providers.
        threads: Size of each process's thread pool.
        rounds: Number of turns of each provider; the order rotates by one each time.
        round_seconds: Target duration of a round, which runs at least one iteration.
        warm_up_seconds: Duration of the warm-up before the first round.
        jobs: Number of providers that are built at the same time.
        progress: Called before each step with the provider's name and the step.
        timeout: Seconds that one step of one provider may take.

    Returns:
        One measurement per entry, in their order. A failure of one provider does not affect the
        others.
    """
    results = {entry.name: Measurement(entry.name) for entry in entries}
    iterations: dict[str, int] = {}
    workers: dict[str, Worker] = {}

    def attempt(name: str, step: Callable[[Worker], None]) -> None:
        try:
            step(workers[name])
        except WorkerError as error:
            results[name].status, results[name].reason = error.status, str(error)
        if results[name].status != "ok":
            workers.pop(name).close()

    def build(entry: Entry) -> None:
        try:
            attempt(entry.name, lambda worker: _build(worker, entry, results[entry.name]))
        finally:
            slots.release()

    # Building is not timed, so it may use every core: mostly imports and compilers of one thread.
    builders = ThreadPoolExecutor(jobs)
    slots = threading.Semaphore(jobs)
    try:
        building = []
        for entry in entries:
            slots.acquire()
            progress(entry.name, "build")
            workers[entry.name] = Worker(threads, timeout)
            building.append(builders.submit(build, entry))
        for done in building:
            done.result()
        for name in list(workers):
            progress(name, "warm up")

            def warm_up(worker: Worker, name: str = name) -> None:
                seconds = worker.request("warm_up", seconds=warm_up_seconds)["seconds"]
                iterations[name] = max(1, round(round_seconds / seconds))

            attempt(name, warm_up)
        for number in range(rounds):
            for name in _rotated(list(workers), number):
                progress(name, f"round {number + 1} of {rounds}")

                def one_round(worker: Worker, name: str = name) -> None:
                    answer = worker.request("round", iterations=iterations[name])
                    results[name].times += answer["times"]
                    results[name].rounds.append((answer["start"], answer["end"]))
                    results[name].cpu_seconds += answer["cpu_seconds"]
                    results[name].peak_bytes = answer["peak_bytes"]
                    results[name].base_bytes = answer["base_bytes"]

                attempt(name, one_round)
        for name in list(workers):

            def details(worker: Worker, name: str = name) -> None:
                results[name].details = worker.request("details")["details"]

            attempt(name, details)
    finally:
        for worker in list(workers.values()):
            worker.close()
        builders.shutdown(cancel_futures=True)
    return list(results.values())


def _build(worker: Worker, entry: Entry, result: Measurement) -> None:
    answer = worker.request("build", target=entry.target, case=entry.case)
    result.error, result.threads = answer["error"], answer["threads"]
    result.build_seconds = answer["seconds"]
    # Negated, so that a NaN is wrong too.
    if not answer["error"] <= entry.limit:
        result.status = "wrong"
        result.reason = f"relative error {answer['error']:.1e}, limit {entry.limit:.1e}"


def _rotated(names: list[str], number: int) -> Iterable[str]:
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]
