"""The children of ``make gpu`` as copies of a process that has imported PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from warm_process import WarmProcess

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def start_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on to the end of the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_window import children

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE", "TimeoutExpired")}
    monkeypatch.setattr(children, "subprocess", SimpleNamespace(Popen=_started, **names))


def _started(
    command: Sequence[str],
    *,
    stdin: int,
    stdout: int,
    stderr: Any,
    start_new_session: bool,
    **more: Any,
) -> WarmProcess:
    assert command[0] == sys.executable
    assert stdin == subprocess.DEVNULL
    assert start_new_session
    return WarmProcess(command[1:], stdout=stdout, stderr=stderr.fileno(), **more)
