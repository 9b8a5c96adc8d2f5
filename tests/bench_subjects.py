"""Providers that behave or misbehave, for test_bench.py; the workers import this by name."""

from __future__ import annotations

import os
import sys
import time

from fused_resnet.bench.subject import Subject, UnavailableError


def good(error: float = 0.0, milliseconds: float = 1.0) -> Subject:
    return Subject(lambda: time.sleep(milliseconds / 1e3), lambda: error)


def noisy() -> Subject:
    """Prints where the protocol speaks, from Python and from below it."""
    print("this is not JSON")
    os.write(1, b"neither is this\n")
    sys.stdout.flush()
    return good()


def raises() -> Subject:
    raise ValueError("first line\nsecond line")


def unavailable() -> Subject:
    raise UnavailableError("pip install something")


def dies_after(calls: int) -> Subject:
    """Ends its process in the middle of a call, as a fault in a kernel would."""
    left = [calls]

    def call() -> None:
        left[0] -= 1
        if left[0] < 0:
            print("last words", file=sys.stderr, flush=True)
            os.abort()
        time.sleep(0.001)

    return Subject(call, lambda: 0.0)


def hangs_after(calls: int) -> Subject:
    left = [calls]

    def call() -> None:
        left[0] -= 1
        time.sleep(60.0 if left[0] < 0 else 0.001)

    return Subject(call, lambda: 0.0)
