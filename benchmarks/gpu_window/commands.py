"""Commands with a time limit, each with all that it starts in a session that can be ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

#: Sessions that run now, by the process that leads them.
LIVE: set[subprocess.Popen[Any]] = set()


class Done(NamedTuple):
    """A command that has ended, or was ended.

    Attributes:
        command: Its words.
        status: ``ok``, ``failed``, or ``cut`` at the time limit.
        seconds: How long it ran.
        output: What it printed, both streams.
    """

    command: tuple[str, ...]
    status: str
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        """The last line that says anything."""
        lines = [line.strip("= ") for line in self.output.splitlines() if line.strip("= ")]
        return lines[-1][:200] if lines else "no output"

    @property
    def text(self) -> str:
        """The command as a person would type it."""
        return shlex.join("python" if word == sys.executable else word for word in self.command)

    def note(self, step: str, case: str, summary: str | None = None) -> dict[str, Any]:
        """A row of the kind ``note``.

        Args:
            step: Name of the step.
            case: Name of the case.
            summary: One line; None takes the last line of the output.
        """
        row = {"kind": "note", "step": step, "case": case, "status": self.status}
        row |= {"summary": summary or self.last_line, "seconds": round(self.seconds, 2)}  # type: ignore[dict-item]
        if self.status == "ok":
            return row
        lines = self.output.splitlines()
        errors = [line for line in lines if "error" in line.lower()][:40]
        reason = "its time was over" if self.status == "cut" else self.last_line
        return {**row, "reason": reason, "command": self.text, "log": [*errors, *lines[-40:]]}


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Done:
    """Run a command, and end it at the limit.

    Args:
        command: Its words.
        environment: All variables.
        seconds: Time limit.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        text=True,
        errors="replace",
        start_new_session=True,
    )
    LIVE.add(process)
    try:
        output, _ = process.communicate(timeout=max(0.1, seconds))
        status = "ok" if process.returncode == 0 else "failed"
        if process.returncode < 0:
            output += f"\nended by {signal.Signals(-process.returncode).name}"
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
        status = "cut"
    except BaseException:
        end(process)
        raise
    finally:
        LIVE.discard(process)
    return Done(tuple(command), status, time.monotonic() - began, output)


def end(process: subprocess.Popen[Any]) -> None:
    """End a command with all that it has started.

    Args:
        process: The leader of its session.
    """
    signal_session(process, signal.SIGKILL)


def signal_session(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to a command and all that it has started.

    Args:
        process: The leader of its session.
        number: The signal.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_all() -> None:
    """End every command that still runs."""
    for process in list(LIVE):
        end(process)


def output_of(*command: str) -> str | None:
    """The output of a short command on one line; None if it fails.

    Args:
        *command: Its words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return " ".join(lines) if done.returncode == 0 and lines else None
