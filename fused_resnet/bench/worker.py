"""One provider in one process: builds its subject, checks its result and runs rounds.

Run as ``python -m fused_resnet.bench.worker``. Requests are JSON lines on stdin; the answer to each
is one JSON line:

======================================= ======================================================
``{"do": "build", "target", "case"}``   imports ``module:function``, calls it with the case;
                                        answers ``error``, ``threads`` and ``seconds``
``{"do": "warm_up", "seconds"}``        runs that long; answers ``seconds`` an iteration
``{"do": "round", "iterations"}``       answers ``times``, in seconds, ``start`` and ``end``,
                                        ``cpu_seconds`` between them, ``peak_bytes`` of memory
                                        resident since building ended, and ``base_bytes`` before;
                                        of training, between the building and the first step
``{"do": "details"}``                   answers further numbers about the subject
``{"do": "call", "target", "case"}``    imports ``module:function``, calls it with the case, and
                                        answers what it returns
======================================= ======================================================

The answer to an exception is ``{"failed": "one line"}`` (``{"unavailable": ...}`` for a provider
whose package is not installed). The process ends when stdin closes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from .memory import peak_bytes, reset_peak
from .subject import Subject, UnavailableError

#: Calls shorter than this are preceded by an untimed one that refills the caches.
REFILL_SECONDS = 0.1


class _Worker:
    def __init__(self) -> None:
        self.call: Callable[[], Any] = lambda: None
        self.subject: Subject | None = None
        self.each = 0.0  # seconds of one call
        self.base: int | None = None  # bytes resident before what is measured

    def build(self, target: str, case: dict[str, Any]) -> dict[str, Any]:
        reset_peak()
        self.base = peak_bytes()
        start = time.perf_counter()
        subject: Subject = call(target, case)
        self.call, self.subject = subject.call, subject
        # Counted as part of the build: the first call compiles. A training step is checked before
        # it is called, since each call changes the parameters.
        if subject.training:
            # What a step adds to the network, the batch and the truth, which all providers have.
            reset_peak()
            self.base = peak_bytes()
            error = subject.error()
            self.call()
        else:
            error = self._check(subject)
        seconds = time.perf_counter() - start
        reset_peak()
        return {
            "error": error,
            "threads": subject.threads or torch.get_num_threads(),
            "seconds": seconds,
        }

    @torch.inference_mode()
    def _check(self, subject: Subject) -> float:
        self.call()
        return subject.error()

    def details(self) -> dict[str, Any]:
        assert self.subject is not None
        return {"details": self.subject.details() if self.subject.details else {}}

    def warm_up(self, seconds: float) -> dict[str, Any]:
        """Run for ``seconds``, at least twice; the fastest iteration is the estimate."""
        times: list[float] = []
        while len(times) < 2 or sum(times) < seconds:
            times += self._run(1)
        self.each = min(times)
        return {"seconds": self.each}

    def round(self, iterations: int) -> dict[str, Any]:
        # Other providers ran since the last round: an untimed iteration refills the caches, which
        # takes a few milliseconds and so is negligible for a long call.
        start, cpu = time.monotonic(), time.process_time()
        if self.each < REFILL_SECONDS:
            self._run(1)
        times = self._run(iterations)
        return {
            "times": times,
            "start": start,
            "end": time.monotonic(),
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": peak_bytes(),
            "base_bytes": self.base,
        }

    def _run(self, iterations: int) -> list[float]:
        times = []
        training = self.subject is not None and self.subject.training
        with torch.inference_mode(not training):
            for _ in range(iterations):
                start = time.perf_counter()
                self.call()
                times.append(time.perf_counter() - start)
        return times


def call(target: str, case: dict[str, Any]) -> Any:
    """Import a function and call it.

    Args:
        target: ``module:function``.
        case: Keyword arguments of the function.
    """
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(**case)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the input ends.

    Args:
        requests: Stream that the requests are read from, a line of JSON for each.
        answers: Stream that the answers are written to, a line of JSON for each.
    """
    worker = _Worker()
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "build": worker.build,
        "warm_up": worker.warm_up,
        "round": worker.round,
        "details": worker.details,
        "call": call,
    }
    for line in requests:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except UnavailableError as error:
            answer = {"unavailable": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def main() -> None:
    """Serve on stdin and stdout; other output of the process goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
