"""Runs pytest in another process, from nothing or from this one's imports."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


#: Called with arguments of pytest, the folder to run in, and variables to set.
Pytest = Callable[[Sequence[str], Path, Mapping[str, str]], Done]


def new_process(arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Done:
    """pytest in a process that imports everything by itself."""
    command = [sys.executable, "-m", "pytest", *arguments]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **variables}, timeout=LIMIT, **kept
        )
    except subprocess.TimeoutExpired as error:
        return Done(None, (error.stdout or b"").decode(errors="replace"))
    return Done(done.returncode, done.stdout)


def forked(arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Done:
    """pytest in a copy of this process, which saves the seconds in which PyTorch is imported.

    This process must have imported nothing of the package, and have no other thread.
    """
    import pytest
    import torch  # noqa: F401

    if "fused_resnet" in sys.modules:
        raise RuntimeError("the child would test the package that this process has imported")
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 3
            try:
                _become(folder, variables, output.fileno())
                code = int(pytest.main(list(arguments)))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        status = _waited(child)
        output.seek(0)
        return Done(status, output.read().decode(errors="replace"))


def _become(folder: Path, variables: Mapping[str, str], output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(variables)
    # The tests' own modules are those of the folder.
    own = str(ROOT / "tests")
    sys.path[:] = [str(folder), *(path for path in sys.path if not path.startswith(own))]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(own):
            del sys.modules[name]


def _waited(child: int) -> int | None:
    waiting = select.poll()
    waiting.register(os.pidfd_open(child), select.POLLIN)
    in_time = bool(waiting.poll(LIMIT * 1000))
    if not in_time:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if in_time else None
