"""Programs with PyTorch imported end, and see the world, as those that ``python`` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm_process
from warm_process import WarmProcess

SEEN = "import os, sys; print(sys.argv, __name__, os.getcwd(), os.environ.get('A'), sys.path[0])"


def started(arguments: list[str], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """By ``python`` and from the server."""
    env = {"PATH": os.defpath, "A": "b c"}
    line = [sys.executable, *arguments]
    return [
        subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True),
        warm_process.run(arguments, cwd=cwd, env=env),
    ]


@pytest.mark.parametrize("kind", ["-c", "-m", "a script"])
def test_a_program_sees_what_python_shows_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    words = {"-c": ["-c", SEEN], "-m": ["-m", "seen"], "a script": [str(tmp_path / "seen.py")]}
    python, warm = started([*words[kind], "one", "two words"], tmp_path)
    assert python.stdout.count("two words") == 1
    assert (warm.returncode, warm.stdout, warm.stderr) == (0, python.stdout, python.stderr)


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(3)",
        "raise SystemExit('a line')",
        "raise SystemExit",
        "import atexit, sys; atexit.register(print, 'at the end'); sys.stderr.write('e')",
        "import os; os.kill(os.getpid(), 9)",
        "import os; print('lost'); os.abort()",
        "print(input())",
    ],
)
def test_a_program_ends_as_python_ends_it(program: str, tmp_path: Path) -> None:
    python, warm = started(["-c", program], tmp_path)
    assert (warm.returncode, warm.stdout) == (python.returncode, python.stdout)
    if "input" in program:
        assert warm.stderr.splitlines()[-1] == python.stderr.splitlines()[-1]
    else:
        assert warm.stderr == python.stderr


def test_pytorch_alone_is_there() -> None:
    names = ("torch", "fused_resnet", "pytest", "conftest", "warm_process", "torch._dynamo")
    program = f"import sys; print([name for name in {names} if name in sys.modules])"
    assert warm_process.run(["-c", program]).stdout == "['torch']\n"


def test_openmps_threads_are_those_of_the_program() -> None:
    program = "import torch; print(torch.get_num_threads())"
    env = {"PATH": os.defpath, "OMP_NUM_THREADS": "3"}
    assert warm_process.run(["-c", program], env=env).stdout == "3\n"


def test_a_process_leads_its_session_and_speaks_through_pipes() -> None:
    program = "import os\nwhile True: print(os.getsid(0), input(), flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": 2}
    process = WarmProcess(["-c", program], **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{process.pid} hello\n".encode()
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == process.poll() == -signal.SIGTERM


def test_a_program_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        warm_process.run(
            ["-c", "import time; print('begun', flush=True); time.sleep(900)"], timeout=1
        )
    assert caught.value.output in ("begun\n", "")


def test_its_seconds_are_counted() -> None:
    before = warm_process.cpu_seconds()
    with pytest.raises(subprocess.CalledProcessError):
        warm_process.run(
            ["-c", "import time\nwhile time.process_time() < 0.3: pass\n1 / 0"], check=True
        )
    assert warm_process.cpu_seconds() - before >= 0.25
