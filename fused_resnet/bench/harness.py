"""The mechanism of every benchmark here: providers take turns, each in a process of its own.

Why so. Two thread pools in one process steal from each other (measured: a factor of two), and a
provider that patches or configures torch must not change the next one: hence one process each. A
shared machine drifts by more than the differences of interest: hence rounds that alternate, so
that drift meets all providers alike, and ratios of medians from the same run. Only one process
computes at a time; the others wait on a pipe. A wrong answer is not timed.
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

#: Seconds that one round of one provider aims for, and the seconds of its warm-up.
ROUND_SECONDS = 0.5
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """One provider of a comparison.

    Attributes:
        name: What the table calls it.
        target: ``module:function`` that builds it; see :class:`fused_resnet.bench.subject.Subject`.
        case: Keyword arguments of that function; what JSON can hold.
        limit: The largest relative error with which it is timed.
    """

    name: str
    target: str
    case: dict[str, Any]
    limit: float


@dataclass
class Measurement:
    """What came of one provider.

    Attributes:
        name: The entry's name.
        status: ``"ok"``, ``"wrong"`` (answer beyond its limit), ``"failed"`` or ``"unavailable"``.
        reason: One line when the status is not ok.
        error: Relative L2 error of its answer, when it gave one.
        threads: Threads of its pool.
        cpu_seconds: Of all its threads, in the rounds.
        peak_bytes: The most memory that its process had resident once it was built, PyTorch's own
            libraries included; None where the system does not tell.
        base_bytes: What the process had resident before it was built: those libraries.
        build_seconds: From import to the first answer.
        times: Seconds of each timed iteration.
        rounds: When each round began and ended, on the clock that all processes share.
        details: What the subject told about itself besides, by name.
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
    """A worker could not answer; ``status`` says whether it failed or is unavailable."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Worker:
    """A child process that answers one request at a time.

    Args:
        threads: Size of its thread pool.
        timeout: Seconds after which a request that is not answered ends the process.
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
            # A Ctrl-C in the terminal is for the parent, which then closes its workers in order.
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

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

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
        """End the process, gently if it listens."""
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
        # Its session holds what it started itself, such as the compiler of torch.compile.
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
    """How many times :func:`compare` calls its progress function at most."""
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
    """Build every entry in its own process, check its answer, time all in alternating rounds.

    Args:
        entries: The providers.
        threads: Size of each process's thread pool.
        rounds: How often each provider has its turn; the order rotates by one each time.
        round_seconds: A round runs as many iterations as fit, at least one.
        warm_up_seconds: Run before the first round.
        jobs: How many are built at a time.
        progress: Called before each step.
        timeout: Seconds that one step of one provider may take.

    Returns:
        One measurement an entry, in the order of the entries. One provider's failure leaves the
        others alone.
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

    # Nothing is timed yet, so building may use every core: it is imports and compilers, mostly on
    # one thread each.
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
                seconds = worker.ask("warm_up", seconds=warm_up_seconds)["seconds"]
                iterations[name] = max(1, round(round_seconds / seconds))

            attempt(name, warm_up)
        for number in range(rounds):
            for name in _rotated(list(workers), number):
                progress(name, f"round {number + 1} of {rounds}")

                def one_round(worker: Worker, name: str = name) -> None:
                    answer = worker.ask("round", iterations=iterations[name])
                    results[name].times += answer["times"]
                    results[name].rounds.append((answer["start"], answer["end"]))
                    results[name].cpu_seconds += answer["cpu_seconds"]
                    results[name].peak_bytes = answer["peak_bytes"]
                    results[name].base_bytes = answer["base_bytes"]

                attempt(name, one_round)
        for name in list(workers):

            def details(worker: Worker, name: str = name) -> None:
                results[name].details = worker.ask("details")["details"]

            attempt(name, details)
    finally:
        for worker in list(workers.values()):
            worker.close()
        builders.shutdown(cancel_futures=True)
    return list(results.values())


def _build(worker: Worker, entry: Entry, result: Measurement) -> None:
    answer = worker.ask("build", target=entry.target, case=entry.case)
    result.error, result.threads = answer["error"], answer["threads"]
    result.build_seconds = answer["seconds"]
    # Written so that a NaN is wrong as well.
    if not answer["error"] <= entry.limit:
        result.status = "wrong"
        result.reason = f"relative error {answer['error']:.1e}, limit {entry.limit:.1e}"


def _rotated(names: list[str], number: int) -> Iterable[str]:
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]
