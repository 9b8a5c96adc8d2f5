"""Builds the extension for one card, and shows that it runs there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import commands

ROOT = Path(__file__).resolve().parents[2]

#: Prints why CUDA's kernels cannot run, and exits with 1 if they can't.
CHECK = "import fused_resnet as fr; s = fr.backends()['cuda']; print(s); raise SystemExit(not s)"


def build(
    environment: Mapping[str, str],
    deadline: float,
    sink: Callable[[dict[str, Any]], Any],
    *,
    rehearse: bool,
) -> bool:
    """Build in place, with no network and no isolation; whether the result runs here.

    Args:
        environment: All variables; they name the card and the instruction sets.
        deadline: Of ``time.monotonic()``.
        sink: Called with the rows.
        rehearse: Whether there is no card: then setup.py only reads its settings.
    """
    command = [sys.executable, "setup.py"]
    command += ["--name"] if rehearse else ["build_ext", "--inplace"]
    done = commands.run(command, environment, deadline - time.monotonic())
    sink(done.note("build", "extension"))
    # What was left half-way by a build that was cut shows in the import.
    code = "import fused_resnet as fr; print(fr.backends()['cuda'])" if rehearse else CHECK
    check = commands.run([sys.executable, "-c", code], environment, 1200 if rehearse else 60)
    sink(check.note("build", "import"))
    return check.status == "ok"
