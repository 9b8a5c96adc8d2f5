"""Small calls of every kernel under compute-sanitizer: memory accesses, and races."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from . import commands

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "gpu" / "run_small_calls.py"

#: What each tool says when it has found nothing.
CLEAN = {"memcheck": r"ERROR SUMMARY: 0 errors", "racecheck": r"RACECHECK SUMMARY: 0 hazards"}

#: Every tool with every backend.
CELLS = tuple((tool, backend) for backend in ("cuda", "triton") for tool in CLEAN)

#: The program's last line, and the head of a finding.
_COMPLETE, _FINDING = "all calls were made", re.compile(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY)")


def find(toolkit: str | None, name: str) -> str | None:
    """A tool of the CUDA toolkit.

    Args:
        toolkit: Its folder; None for none.
        name: ``"compute-sanitizer"`` or ``"ncu"``.
    """
    folders = [f"{toolkit}/bin", f"{toolkit}/compute-sanitizer"] if toolkit else []
    for folder in (*folders, None):
        found = shutil.which(name, path=folder)
        if found:
            return found
    return None


#: A kernel to profile, which shows whether this user may read the card's counters.
_COUNTED = ("--metrics", "sm__cycles_elapsed.avg", "--launch-count", "1")
_KERNEL = "import torch; torch.ones(8, device='cuda').sum()"


def tools(
    toolkit: str | None,
    environment: Mapping[str, str],
    sink: Callable[[dict[str, Any]], Any],
    *,
    rehearse: bool,
) -> None:
    """A row for each tool: whether it runs, or why it does not.

    Args:
        toolkit: Folder of the CUDA toolkit; None for none.
        environment: All variables.
        sink: Called with the rows.
        rehearse: Whether there is no kernel to profile.
    """
    for name in ("compute-sanitizer", "ncu"):
        program = find(toolkit, name)
        if program is None:
            reason = f"{name} is neither in the toolkit nor on PATH"
            row = {"kind": "note", "step": "machine", "case": name, "summary": reason}
            sink({**row, "status": "unavailable", "reason": reason})
            continue
        command = [program, "--version"]
        if name == "ncu" and not rehearse:
            command = [program, *_COUNTED, sys.executable, "-c", _KERNEL]
        row = commands.run(command, environment, 300 if rehearse else 20).note("machine", name)
        if row["status"] != "ok":  # as on most machines that are shared: that is what was asked
            row["status"] = "unavailable"
        sink(row)


def run(
    program: Sequence[str] | None,
    environment: Mapping[str, str],
    deadline: float,
    sink: Callable[[dict[str, Any]], Any],
    cells: Sequence[tuple[str, str]] = CELLS,
) -> None:
    """Tools and backends at once: each spends most of its time on the host.

    Args:
        program: The words that stand before ``--tool``; None where there is no sanitizer.
        environment: All variables.
        deadline: Of ``time.monotonic()``.
        sink: Called with the rows, from this thread.
        cells: A tool and the backend whose kernels run under it, of each process.
    """
    if program is None:
        reason = "compute-sanitizer is neither in the toolkit nor on PATH"
        row = {"kind": "note", "step": "sanitizer", "case": "compute-sanitizer", "summary": reason}
        sink({**row, "status": "unavailable", "reason": reason})
        return
    # Without PyTorch's cache an allocation ends where its tensor ends.
    variables = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def one(cell: tuple[str, str]) -> dict[str, Any]:
        tool, backend = cell
        command = [*program, "--tool", tool, "--error-exitcode", "99"]
        command += [sys.executable, str(PROGRAM), "device", backend]
        done = commands.run(command, variables, deadline - time.monotonic())
        return result_of(done, tool, backend)

    with ThreadPoolExecutor(len(cells)) as pool:
        try:
            for future in as_completed([pool.submit(one, cell) for cell in cells]):
                sink(future.result())
        except BaseException:  # the pool would wait for them
            commands.end_all()
            raise


def result_of(done: commands.Done, tool: str, backend: str) -> dict[str, Any]:
    """The row of a tool.

    Args:
        done: The command.
        tool: A key of :data:`CLEAN`.
        backend: Whose kernels ran.
    """
    lines = done.output.splitlines()
    calls = [one for one in lines if ": " in one and not one.startswith("=")]
    findings = [i for i, one in enumerate(lines) if _FINDING.match(one)]
    clean = re.search(CLEAN[tool], done.output) is not None
    row = done.note("sanitizer", f"{tool}, {backend}", f"{len(calls)} calls")
    if done.status == "ok" and clean and _COMPLETE in done.output:
        return row
    if findings:
        first = findings[0]
        row |= {"status": "wrong", "reason": lines[first][:300], "log": lines[first : first + 40]}
    elif done.status == "cut":
        row["reason"] = f"its time was over after {len(calls)} calls, without a finding"
    else:
        row |= {"status": "failed", "reason": f"no result: {done.last_line}", "log": lines[-40:]}
    return row
