"""Both windows without a card, and the checks of what they write.

Every step runs by the code that a card's runs by, in the same processes and under the same
deadlines, at tiny sizes: CUDA's kernels in the simulator of the tests, Triton's in the interpreter.
What only a card has is replaced where it is called: the compiler of the build reads its settings
alone, the sanitizer is a program that makes the small calls, and nothing is captured in a graph.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import card
from .budget import FIRST, LIMIT, RESERVE, SECOND, Budget, Share
from .rows import BAD, Row, problems, read
from .window import Window

#: What comes back from the machine: files, bytes of each, folders in one another.
MOST_FILES, MOST_BYTES, MOST_DEPTH = 8, 16 * 2**20, 2

#: What each step of each window must have written at the least: kind, and words of the row.
EXPECTED: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "first": [
        ("build", "note", {"case": "extension"}),
        ("build", "note", {"job": "triton 1"}),
        ("build", "note", {"job": "inductor"}),
        ("machine", "note", {"case": "versions"}),
        ("machine", "time", {"what": "copy of 4096 bytes"}),
        ("machine", "note", {"case": "compute-sanitizer"}),
        ("machine", "note", {"case": "ncu"}),
        *(
            ("correctness", "check", {"backend": backend, "operation": operation})
            for backend in ("cuda", "triton")
            for operation in (
                "conv_bn_add_relu", "conv_statistics", "bn_add_relu", "bn_add_relu, training",
                "bn_add_relu_backward, training", "conv_bn_relu_maxpool", "residual_block",
            )
        ),
        ("correctness", "check", {"backend": "cuda", "plan": "tile 0, split 1"}),
        ("correctness", "check", {"backend": "triton", "plan": "128x64x64, 4 warps, 4 stages"}),
        ("correctness", "test", {}),
        ("layers", "time", {"provider": "eager", "fusion": "conv"}),
        ("layers", "time", {"provider": "cuda, tile 2, split 1", "fusion": "conv"}),
        ("layers", "time", {"provider": "triton", "fusion": "conv"}),
        ("layers", "time", {"provider": "cuda", "fusion": "block"}),
        ("layers", "time", {"provider": "library", "fusion": "training"}),
        ("layers", "time", {"provider": "cuda", "fusion": "training"}),
        ("layers", "time", {"provider": "eager", "fusion": "none"}),
        ("networks", "time", {"provider": "frozen, cuda"}),
        ("networks", "time", {"provider": "fused, triton"}),
        ("networks", "time", {"provider": "compile"}),
        ("runtime", "test", {}),
        ("sanitizer", "note", {"case": "memcheck, cuda"}),
        ("sanitizer", "note", {"case": "racecheck, triton"}),
        ("archive", "note", {"case": "caches"}),
    ],
    "second": [
        ("build", "note", {"case": "extension"}),
        ("machine", "time", {"what": "product of 64 x 64 matrices"}),
        ("sweep", "note", {"job": "compile 1"}),
        ("sweep", "time", {"provider": "triton"}),
        ("autotune", "time", {"provider": "compile, max-autotune"}),
        ("archive", "note", {"case": "caches"}),
    ],
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Rehearse both windows; 0 if all that they write is as it should be.

    Args:
        arguments: See :mod:`.arguments`.
    """
    found = budget_problems(FIRST) + budget_problems(SECOND)
    stand_in = Path(__file__).resolve().parent / "stand_in_sanitizer.py"
    arguments.sanitizer = shlex.join([sys.executable, str(stand_in)])
    device = {**card.REHEARSED, **card.processor()}
    for window in ("first", "second"):
        one = Window(arguments, device)
        one.run()
        found += [f"{window}: {text}" for text in window_problems(one, window)]
        if not one.archive.exists():  # an interrupted window has none
            break
        arguments.caches, arguments.sanitizer = one.archive, None
    found += out_problems(arguments.out)
    for text in found:
        print(f"gpu: rehearsal: {text}", file=sys.stderr)
    print(f"gpu: rehearsal: {'as it should be' if not found else f'{len(found)} problems'}")
    return 1 if found else 0


def budget_problems(shares: Sequence[Share], seconds: float = LIMIT) -> list[str]:
    """Whether a window ends in time, whatever its steps do.

    Args:
        shares: Of the window.
        seconds: Its length.
    """
    found = []
    for name, uses in (("used up", 1.0), ("left half-way", 0.5), ("overrun by a tenth", 1.1)):
        now = [0.0]
        budget = Budget(shares, seconds, lambda now=now: now[0])  # type: ignore[misc]
        for share in shares:
            deadline = budget.deadline(share.step)
            if not now[0] <= deadline <= seconds - RESERVE * seconds / LIMIT + 1e-6:
                found.append(f"{share.step}: {name}: the deadline {deadline:.0f} is out of place")
            now[0] = min(now[0] + uses * (deadline - now[0]), seconds)
        if uses <= 1 and now[0] > seconds - RESERVE * seconds / LIMIT + 1e-6:
            found.append(f"a window whose steps are {name} ends at {now[0]:.0f} s")
    return found


def window_problems(window: Window, name: str) -> list[str]:
    """What is wrong with the rows of a window.

    Args:
        window: It has run.
        name: A key of :data:`EXPECTED`.
    """
    rows = read(window.file.path)
    found = []
    if rows != json.loads(json.dumps(window.file.rows)):
        found.append("the file does not have the rows that were written")
    for row in rows:
        found += [f"{row.get('step')}, {row.get('case')}: {text}" for text in problems(row)]
        if row.get("status") in (*BAD, "cut") or (
            row["kind"] != "test" and row["status"] == "skipped"
        ):
            found.append(f"{row['step']}, {row['case']}: {row['status']}: {row.get('reason')}")
    for step, kind, words in EXPECTED[name]:
        if not any(_matches(row, step, kind, words) for row in rows):
            found.append(f"{step}: no {kind} row that is ok with {words}")
    for row in rows:
        if row["case"] == "step" and row["seconds"] > row["share"] + 15:
            found.append(f"{row['step']}: {row['seconds']} s of a share of {row['share']} s")
    summary = window.stem.with_suffix(".txt").read_text()
    steps = {row["step"] for row in rows}
    found += [f"the summary does not name {step}" for step in steps if step not in summary]
    return found


def _matches(row: Row, step: str, kind: str, words: Mapping[str, Any]) -> bool:
    # A tool that is not there is said to be unavailable, and that is a row too.
    good = row["status"] == "ok" or (row["status"] == "unavailable" and "case" in words)
    found = {"step": step, "kind": kind, **words}
    return good and all(row.get(key) == value for key, value in found.items())


def out_problems(out: Path) -> list[str]:
    """Whether all of a folder comes back from the machine.

    Args:
        out: The folder.
    """
    files = [path for path in out.rglob("*") if path.is_file()]
    found = []
    if len(files) > MOST_FILES:
        found.append(f"{out}: expected at most {MOST_FILES} files, got {len(files)}")
    for path in files:
        if path.stat().st_size > MOST_BYTES:
            found.append(f"{path}: expected at most {MOST_BYTES} bytes, got {path.stat().st_size}")
        if len(path.relative_to(out).parts) > MOST_DEPTH + 1:
            found.append(f"{path}: expected at most {MOST_DEPTH} folders")
    return found
