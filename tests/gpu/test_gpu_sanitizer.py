"""Every kernel, small, under compute-sanitizer: accesses out of bounds, and races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
#: What each says when it has found nothing.
CLEAN = {"memcheck": r"ERROR SUMMARY: 0 errors", "racecheck": r"RACECHECK SUMMARY: 0 hazards"}


def sanitizer() -> str | None:
    home = cpp_extension.CUDA_HOME or "/usr/local/cuda"
    for folder in (Path(home, "bin"), Path(home, "compute-sanitizer"), None):
        found = shutil.which("compute-sanitizer", path=None if folder is None else str(folder))
        if found:
            return found
    return None


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[subprocess.Popen, IO[str]]]]:
    """Both tools at once: each spends most of its time on the host."""
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither in CUDA_HOME nor on PATH")
    folder = tmp_path_factory.mktemp("sanitizer")
    # Without PyTorch's cache an allocation ends where its tensor ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = {}
    for tool in CLEAN:
        log = (folder / f"{tool}.log").open("w+")
        command = [program, "--tool", tool, "--error-exitcode", "99"]
        command += [sys.executable, str(HERE / "run_small_calls.py"), "device"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        started[tool] = (process, log)
    yield started
    for process, log in started.values():
        process.kill()
        process.wait()
        log.close()


@pytest.mark.parametrize("tool", CLEAN)
def test_sanitizer_finds_nothing(running, tool):
    process, log = running[tool]
    try:
        code: int | str = process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        code = "none within 150 s"
    log.seek(0)
    text = log.read()
    tail = "\n".join(text.splitlines()[-60:])
    assert "all calls were made" in text, f"exit code {code}\n{tail}"
    first = text.find("========= ", text.find("\n"))
    around = text[max(0, first - 200) : first + 4000]
    assert re.search(CLEAN[tool], text), f"exit code {code}\n{around}"
    assert code == 0, f"exit code {code}\n{tail}"
