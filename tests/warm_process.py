"""Python processes that begin with PyTorch imported: copies of one that has imported nothing else.

Importing PyTorch takes 2.5 seconds of a processor, more than what most programs of the tests do
after it. A server imports it once for each process of the tests, and forks for each program. What a
program then does is what ``python`` would do with the same words, except that PyTorch does not see
the variables that it reads at its import (OMP_NUM_THREADS is set for it), and that no destructor of
C++ runs at the end: a test that is about either starts ``python`` itself.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

#: Bytes of a request, which holds the words of a command and all variables of its environment.
MOST = 1 << 17

_lock = threading.Lock()
_server: socket.socket | None = None
_spent = 0.0


def cpu_seconds() -> float:
    """Of all programs that have ended, and of what they waited for.

    ``os.times()`` has them not, as the server waits for them.
    """
    return _spent


class WarmProcess:
    """As ``subprocess.Popen``, in a session of its own.

    Args:
        arguments: What would stand behind ``python``: a script, ``-m`` and a module, or ``-c`` and
            a program, each with its arguments.
        env: All variables; None takes this process's.
        cwd: The folder to run in; None takes this process's.
        stdin: ``subprocess.DEVNULL`` or ``subprocess.PIPE``.
        stdout: Descriptor, or ``subprocess.PIPE``.
        stderr: Descriptor, or ``subprocess.STDOUT``.

    Attributes:
        stdin: The pipe, to write bytes to; None without one.
        stdout: The pipe, to read bytes from; None without one.
        pid: Of the process, which leads its session.
        returncode: As that of ``subprocess.Popen``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int,
        stderr: int = subprocess.STDOUT,
    ) -> None:
        self.args = [sys.executable, *map(str, arguments)]
        self.returncode: int | None = None
        self.stdin = self.stdout = None
        if stdin == subprocess.PIPE:
            source, ours = os.pipe()
            self.stdin = os.fdopen(ours, "wb")
        else:
            source = os.open(os.devnull, os.O_RDONLY)
        output = stdout
        if stdout == subprocess.PIPE:
            ours, output = os.pipe()
            self.stdout = os.fdopen(ours, "rb", 0)
        errors = output if stderr == subprocess.STDOUT else stderr
        status, theirs = os.pipe()
        request = {"arguments": self.args[1:], "env": dict(os.environ if env is None else env)}
        request["cwd"] = os.fspath(os.getcwd() if cwd is None else cwd)
        with _lock:
            socket.send_fds(
                server(), [json.dumps(request).encode()], [source, output, errors, theirs]
            )
        os.close(source)
        os.close(theirs)
        if stdout == subprocess.PIPE:
            os.close(output)
        self._status = os.fdopen(status, "r")
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: It still runs after ``timeout`` seconds.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        global _spent
        with _lock:
            if self.returncode is not None:
                return self.returncode
        if not _readable(self._status.fileno(), timeout):
            return None
        with _lock:
            if self.returncode is None:
                code, seconds = self._status.readline().split()
                self.returncode = int(code)
                _spent += float(seconds)
                self._status.close()
            return self.returncode


def instead_of_popen(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> None:
    """Let a module start its processes like this, to the end of a test."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE", "TimeoutExpired")}
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(Popen=_popen, **names))


def _popen(
    command: Sequence[str], *, stderr: IO[bytes], start_new_session: bool, **more: Any
) -> WarmProcess:
    assert command[0] == sys.executable
    assert start_new_session
    return WarmProcess(command[1:], stderr=stderr.fileno(), **more)


def run(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)``.

    Args:
        arguments: See :class:`WarmProcess`.
        env: See :class:`WarmProcess`.
        cwd: See :class:`WarmProcess`.
        check: Whether an exit code other than 0 is an error.
        timeout: Seconds after which the whole session is killed.

    Raises:
        subprocess.TimeoutExpired: The time was over.
        subprocess.CalledProcessError: ``check``, and the exit code is not 0.
    """
    files = [os.memfd_create(name) for name in ("stdout", "stderr")]
    try:
        process = WarmProcess(arguments, env=env, cwd=cwd, stdout=files[0], stderr=files[1])
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                error.output = _text(files[0])
            raise
        done = subprocess.CompletedProcess(process.args, code, *map(_text, files))
    finally:
        for file in files:
            os.close(file)
    if check and code:
        print(done.stdout, done.stderr, sep="\n")
        done.check_returncode()
    return done


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def _readable(file: int, timeout: float | None) -> bool:
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(None if timeout is None else timeout * 1000))


def server() -> socket.socket:
    """The connection to this process's server, which is started if there is none."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        atexit.register(_server.close)  # which ends the server
    return _server


# What follows runs in the server and in its children.


def serve(connection: socket.socket) -> None:
    """Fork for each request, until the other side is gone."""
    import torch  # noqa: F401

    del sys.path[0]  # this file's folder
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who report
    while True:
        data, files, _, _ = socket.recv_fds(connection, MOST, 4)
        if not data:
            return
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _report(json.loads(data), *files)
        for file in files:
            os.close(file)


def _report(request: dict[str, Any], source: int, output: int, errors: int, status: int) -> None:
    """Run the program in a child, and write its end to ``status``."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.write(status, f"{os.getpid()}\n".encode())
        os.close(status)
        _become(request, source, output, errors)
    for file in (source, output, errors):
        os.close(file)
    _, ended, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    os.write(status, f"{code} {used.ru_utime + used.ru_stime}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], *files: int) -> None:
    code = 1
    try:
        for place, file in enumerate(files):
            os.dup2(file, place)
        os.closerange(3, max(files) + 1)
        # Buffered as what they are now, not as the server's were.
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
            2, "w", buffering=1, errors="backslashreplace", closefd=False
        )
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        if threads := os.environ.get("OMP_NUM_THREADS", ""):  # which OpenMP has read already
            sys.modules["torch"].set_num_threads(int(threads))
        os.chdir(request["cwd"])
        code = _program(request["arguments"])
    finally:
        os._exit(code)


def _program(arguments: list[str]) -> int:
    """Run it; its exit code."""
    kind, *rest = arguments
    code = 0
    try:
        path = [word for word in os.environ.get("PYTHONPATH", "").split(os.pathsep) if word]
        first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind)))
        sys.path[:0] = [first, *map(os.path.abspath, path)]
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        try:
            end()
        except BaseException:
            traceback.print_exc()
            code = code or 120
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
