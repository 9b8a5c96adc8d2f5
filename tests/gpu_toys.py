"""Cases that fail in every way, which tests/bench/test_gpu_children.py runs in child processes."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fused_resnet.bench.gpu.cases import Case, Row, UnavailableError, note


def cases(target: Any, names: Sequence[str], seconds: float = 0.0) -> list[Case]:
    """A case for each name; what it does is the first word of it."""
    return [Case(name, functools.partial(_run, name, seconds)) for name in names]


def _run(name: str, seconds: float) -> Iterator[Row]:
    kind = name.split()[0]
    time.sleep(seconds)
    if kind == "raises":
        raise ValueError("first line\nsecond line")
    if kind == "lacks":
        raise UnavailableError("pip install something")
    if kind == "malformed":
        yield {"kind": "time", "status": "ok"}
        return
    print("this is not JSON")
    os.write(1, b"neither is this\n")
    yield note(f"{name} by {os.getpid()}", pid=os.getpid())
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        time.sleep(600)
