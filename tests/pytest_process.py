"""Runs pytest in another process, from nothing or with PyTorch imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import warm_process

#: Seconds after which tests are ended: a bug may also make them wait, or go on, for ever.
LIMIT = 900


@dataclass(frozen=True)
class Done:
    """The end of a process.

    Attributes:
        status: Its exit code, the negative number of the signal that it died of, or None for one
            that did not end in time.
        output: What it printed.
    """

    status: int | None
    output: str

    @property
    def violent_end(self) -> str | None:
        """How it ended, if it did not end by itself."""
        if self.status is None:
            return f"a test that does not end within {LIMIT} s"
        if self.status < 0:
            return f"the death of the tests' process, by {signal.Signals(-self.status).name}"
        return None


def new_process(arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Done:
    """pytest in a process that imports everything by itself.

    Args:
        arguments: Of pytest.
        folder: The folder to run in.
        variables: They are set beside this process's.
    """
    command = [sys.executable, "-m", "pytest", *arguments]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **variables}, timeout=LIMIT, **kept
        )
    except subprocess.TimeoutExpired as error:
        return Done(None, (error.stdout or b"").decode(errors="replace"))
    return Done(done.returncode, done.stdout)


def warm(arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Done:
    """pytest in a process that begins with PyTorch imported, and with nothing else.

    Args:
        arguments: Of pytest.
        folder: The folder to run in.
        variables: They are set beside this process's.
    """
    command = ["-m", "pytest", *arguments]
    env = {**os.environ, **variables}
    try:
        done = warm_process.run(command, cwd=folder, env=env, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        return Done(None, error.output or "")
    return Done(done.returncode, done.stdout + done.stderr)
