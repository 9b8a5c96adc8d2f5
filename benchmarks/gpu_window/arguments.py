"""The arguments of ``make gpu``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .budget import LIMIT

ROOT = Path(__file__).resolve().parents[2]

#: A rehearsal is about what is written, also on a busy machine: none of its steps is cut.
PATIENCE = 20


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked.

    Args:
        argv: Words of the command; None takes the process's.
    """
    out = os.environ.get("OUT")
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py",
        description="Build for the card that is here, check and measure everything, and write a "
        "line of JSON for each result. Exit code 0 if nothing failed, 1 if something did, 2 if it "
        "could not start.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else ROOT / "benchmarks" / "results",
        help="folder of the results (default: $OUT, else benchmarks/results)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"length of the window (default: {LIMIT:g}, and {PATIENCE} times that in a rehearsal)",
    )
    parser.add_argument(
        "--caches",
        type=Path,
        help="the archive of a first window: go on from there, with max-autotune and a sweep over "
        "the five layers that lose most",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run every step of both windows without a card, on the simulator and the interpreter "
        "at tiny sizes, and check what they write",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "gpu-window",
        help="folder of caches and logs (default: build/gpu-window)",
    )
    parser.add_argument("--commit", help="the commit, for a copy without .git")
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = LIMIT * (PATIENCE if arguments.rehearse else 1)
    if not arguments.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {arguments.seconds}")
    if arguments.rehearse and arguments.caches:
        parser.error("--caches: expected no --rehearse, which runs both windows")
    if arguments.caches and not arguments.caches.is_file():
        parser.error(f"--caches: expected a file, got {arguments.caches}")
    return arguments
